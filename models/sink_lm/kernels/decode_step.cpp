// One decode step of a Llama-style decoder over the sink cache, on a CPU with AVX-512 VNNI.
//
// A step of one session reads every weight once and multiplies it once, so that memory sets its
// speed if nothing else gets in the way. Torch needs some 1,800 small operators for it. Here it is
// one call, and every thread stays in it from the embedding to the logits. Matrices read inputs of
// 8 bits (matrix.h); everything else is float32, and bfloat16 in the cache. A row (session) is
// computed by itself and in one order, whatever the number of rows and threads: its logits do not
// depend on who shares the batch.

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "matrix.h"

namespace {

// The next three structures are filled by decode_step.py, field by field.
struct Layer {
  Matrix qkv, out, gate_up, down;
  const float *attention_norm, *mlp_norm;
  const float *q_norm, *k_norm;  // null without
};

struct Decoder {
  Matrix head;
  const Layer* layers;
  const float* norm;
  const uint16_t* embedding;  // bfloat16 [vocabulary, hidden]
  const double* frequencies;  // [head_dim / 2]
  int64_t num_layers, hidden, intermediate, heads, kv_heads, head_dim;
  double eps, rope_scale;
};

struct Batch {
  const int64_t *tokens, *slots, *lengths, *sinks, *places;  // [rows]
  uint16_t *keys, *values;  // bfloat16 [layers, sessions, kv_heads, capacity, head_dim]
  float* logits;            // [rows, vocabulary]
  int64_t rows, sessions, capacity, threads;
};

// exp of 16 numbers, to 2e-7 of them: 2^n times a polynomial on half an octave to each side. Where
// one operand is no number, min and max return the second: such inputs come out as they are.
__m512 exp16(__m512 x) {
  x = _mm512_max_ps(_mm512_set1_ps(-104.0f), _mm512_min_ps(_mm512_set1_ps(88.0f), x));
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 0);
  __m512 f = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
  f = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), f);
  __m512 y = _mm512_set1_ps(1.0f / 720);
  for (float c : {1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f})
    y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(c));
  return _mm512_scalef_ps(y, n);
}

// x / rms(x) * weight, [size].
void rms_norm(const float* x, const float* weight, int64_t size, double eps, float* out) {
  float squares = 0;
#pragma omp simd reduction(+ : squares)
  for (int64_t i = 0; i < size; ++i) squares += x[i] * x[i];
  const float factor = 1.0f / std::sqrt(squares / size + static_cast<float>(eps));
  for (int64_t i = 0; i < size; ++i) out[i] = x[i] * factor * weight[i];
}

// silu(gate) * up; `gate_up` is [2 * size], `out` [size]. Sizes are multiples of 32.
void gated(const float* gate_up, int64_t size, float* out) {
  const __m512 one = _mm512_set1_ps(1.0f);
  for (int64_t i = 0; i < size; i += 16) {
    const __m512 gate = _mm512_loadu_ps(gate_up + i), up = _mm512_loadu_ps(gate_up + size + i);
    const __m512 low = exp16(_mm512_sub_ps(_mm512_setzero_ps(), gate));
    _mm512_storeu_ps(out + i, _mm512_mul_ps(_mm512_div_ps(gate, _mm512_add_ps(one, low)), up));
  }
}

float widened(uint16_t x) {
  const uint32_t bits = static_cast<uint32_t>(x) << 16;
  float wide;
  __builtin_memcpy(&wide, &bits, 4);
  return wide;
}

// To bfloat16, to nearest and even, as torch does.
uint16_t narrowed(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  if (x != x) return 0x7fc0;
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// Cosines and sines of one position, [head_dim / 2] each. Phases are float64, as in rope.py.
struct Rotation {
  std::vector<float> cos, sin;

  Rotation(const Decoder& d, int64_t position, double scale)
      : cos(d.head_dim / 2), sin(d.head_dim / 2) {
    for (size_t i = 0; i < cos.size(); ++i) {
      const double phase = static_cast<double>(position) * d.frequencies[i];
      cos[i] = static_cast<float>(std::cos(phase) * scale);
      sin[i] = static_cast<float>(std::sin(phase) * scale);
    }
  }

  // Rotates the pairs (i, i + width / 2).
  void operator()(const float* x, float* out) const {
    const size_t half = cos.size();
    for (size_t i = 0; i < half; ++i) {
      out[i] = x[i] * cos[i] - x[i + half] * sin[i];
      out[i + half] = x[i + half] * cos[i] + x[i] * sin[i];
    }
  }
};

// What a session's attention needs in every layer.
struct Rotations {
  Rotation key, query, query_for_sinks;

  // A query's rotation also divides by the square root of the width.
  Rotations(const Decoder& d, const Batch& b, int64_t row)
      : key(d, b.lengths[row], d.rope_scale),
        query(d, b.lengths[row], d.rope_scale / std::sqrt(double(d.head_dim))),
        query_for_sinks(d, std::min(b.lengths[row], b.capacity - 1),
                        d.rope_scale / std::sqrt(double(d.head_dim))) {}
};

// 32 bfloat16 numbers are 16 pairs: the first of every pair, and the second.
struct Pairs {
  __m512 even, odd;
  explicit Pairs(const uint16_t* x) {
    const __m512i both = _mm512_loadu_si512(x);
    even = _mm512_castsi512_ps(_mm512_slli_epi32(both, 16));
    odd = _mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32(int(0xffff0000u))));
  }
};

// Sums every one of 16 registers; lane i of the result is the sum of s[i].
__m512 sum16(const __m512* s) {
  __m512 four[4];
  for (int i = 0; i < 4; ++i) {
    __m512d two[2];
    for (int j = 0; j < 2; ++j) {
      const __m512 a = s[4 * i + 2 * j], b = s[4 * i + 2 * j + 1];
      two[j] = _mm512_castps_pd(_mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b)));
    }
    four[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(two[0], two[1])),
                            _mm512_castpd_ps(_mm512_unpackhi_pd(two[0], two[1])));
  }
  const auto folded = [](__m512 a, __m512 b) {
    return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
  };
  return folded(folded(four[0], four[1]), folded(four[2], four[3]));
}

// Scores of the keys `first` to `last` - 1 for one query, whose pairs are split by 32 numbers.
void score(const uint16_t* keys, int64_t first, int64_t last, const float* query, int64_t width,
           float* scores) {
  for (int64_t c = first; c < last; c += 16) {
    const int64_t count = std::min<int64_t>(16, last - c);
    __m512 sums[16];
    for (int i = 0; i < 16; ++i) {
      const uint16_t* key = keys + (c + std::min<int64_t>(i, count - 1)) * width;
      sums[i] = _mm512_setzero_ps();
      for (int64_t d = 0; d < width; d += 32) {
        const Pairs pairs(key + d);
        sums[i] = _mm512_fmadd_ps(pairs.even, _mm512_loadu_ps(query + d), sums[i]);
        sums[i] = _mm512_fmadd_ps(pairs.odd, _mm512_loadu_ps(query + d + 16), sums[i]);
      }
    }
    _mm512_mask_storeu_ps(scores + c, __mmask16((1u << count) - 1), sum16(sums));
  }
}

// Turns scores [size] into exp(score - largest) and returns 1 / their sum.
float soften(float* scores, int64_t size) {
  float largest = scores[0];
#pragma omp simd reduction(max : largest)
  for (int64_t c = 0; c < size; ++c) largest = std::max(largest, scores[c]);
  __m512 sum = _mm512_setzero_ps();
  for (int64_t c = 0; c < size; c += 16) {
    const __mmask16 mask = size - c < 16 ? __mmask16((1u << (size - c)) - 1) : __mmask16(0xffff);
    const __m512 x = _mm512_maskz_loadu_ps(mask, scores + c);
    const __m512 e = exp16(_mm512_sub_ps(x, _mm512_set1_ps(largest)));
    _mm512_mask_storeu_ps(scores + c, mask, e);
    sum = _mm512_mask_add_ps(sum, mask, sum, e);
  }
  return 1.0f / _mm512_reduce_add_ps(sum);
}

// Values weighted for kQueries queries, 32 numbers of a head at a time: out [kQueries, width].
template <int kQueries>
void mix(const uint16_t* values, const float* weights, int64_t capacity, int64_t used,
         int64_t width, const float* factors, float* out) {
  for (int64_t d = 0; d < width; d += 32) {
    __m512 even[kQueries], odd[kQueries];
    for (int q = 0; q < kQueries; ++q) even[q] = odd[q] = _mm512_setzero_ps();
    for (int64_t c = 0; c < used; ++c) {
      const Pairs pairs(values + c * width + d);
      for (int q = 0; q < kQueries; ++q) {
        const __m512 weight = _mm512_set1_ps(weights[q * capacity + c]);
        even[q] = _mm512_fmadd_ps(pairs.even, weight, even[q]);
        odd[q] = _mm512_fmadd_ps(pairs.odd, weight, odd[q]);
      }
    }
    for (int q = 0; q < kQueries; ++q) {
      float pair[2][16];
      _mm512_storeu_ps(pair[0], even[q]);
      _mm512_storeu_ps(pair[1], odd[q]);
      for (int i = 0; i < 32; ++i) out[q * width + d + i] = pair[i % 2][i / 2] * factors[q];
    }
  }
}

// One key/value head of one session: writes the new key and value, then attends for its queries.
void attend(const Decoder& d, const Batch& b, const Layer& layer, int64_t index, int64_t row,
            int64_t head, const Rotations& rotations, const float* qkv, float* scores, float* out) {
  const int64_t width = d.head_dim, queries = d.heads / d.kv_heads;
  const int64_t slab = (index * b.sessions + b.slots[row]) * d.kv_heads + head;
  uint16_t* keys = b.keys + slab * b.capacity * width;
  uint16_t* values = b.values + slab * b.capacity * width;
  const int64_t used = std::min(b.lengths[row] + 1, b.capacity);
  const int64_t sinks = std::min(b.sinks[row], used);
  std::vector<float> plain(width), turned(width), split(width);

  const float* key = qkv + (d.heads + head) * width;
  if (layer.k_norm) {
    rms_norm(key, layer.k_norm, width, d.eps, plain.data());
    key = plain.data();
  }
  rotations.key(key, turned.data());
  const float* value = qkv + (d.heads + d.kv_heads + head) * width;
  for (int64_t i = 0; i < width; ++i) {
    keys[b.places[row] * width + i] = narrowed(turned[i]);
    values[b.places[row] * width + i] = narrowed(value[i]);
  }

  std::vector<float> factors(queries);
  for (int64_t q = 0; q < queries; ++q) {
    const float* query = qkv + (head * queries + q) * width;
    if (layer.q_norm) {
      rms_norm(query, layer.q_norm, width, d.eps, plain.data());
      query = plain.data();
    }
    float* mine = scores + q * b.capacity;
    const auto part = [&](const Rotation& rotate, int64_t first, int64_t last) {
      rotate(query, turned.data());
      for (int64_t i = 0; i < width; ++i) split[i / 32 * 32 + i % 2 * 16 + i % 32 / 2] = turned[i];
      score(keys, first, last, split.data(), width, mine);
    };
    // Inside the cache the sinks are nearer than in the stream.
    if (sinks) part(rotations.query_for_sinks, 0, sinks);
    part(rotations.query, sinks, used);
    factors[q] = soften(mine, used);
  }
  for (int64_t q = 0; q < queries;) {
    const auto mixed = [&](auto way, int64_t count) {
      way(values, scores + q * b.capacity, b.capacity, used, width, &factors[q],
          out + (head * queries + q) * width);
      q += count;
    };
    if (queries - q >= 4) mixed(mix<4>, 4);
    else if (queries - q == 3) mixed(mix<3>, 3);
    else if (queries - q == 2) mixed(mix<2>, 2);
    else mixed(mix<1>, 1);
  }
}

// Memory of a call: kept by the thread that calls, so that a step allocates next to nothing.
struct Scratch {
  std::vector<float> floats;
  std::vector<int32_t> sums;
  std::vector<int8_t> bytes;
  size_t used = 0;

  void reserve(size_t numbers, size_t inputs) {
    used = 0;
    if (floats.size() < numbers) floats.resize(numbers);
    if (bytes.size() < inputs) bytes.resize(inputs);
    if (sums.size() < inputs / kGroup) sums.resize(inputs / kGroup);
  }
  float* take(size_t numbers) {
    used += numbers;
    return floats.data() + used - numbers;
  }
  Rounded rounded(size_t inputs) {
    float *scales = take(inputs / kGroup), *totals = take(inputs / kGroup);
    return {bytes.data(), scales, totals, sums.data()};
  }
};

Scratch& scratch() {
  static thread_local Scratch mine;
  return mine;
}

}  // namespace

// out [rows, outputs] = x [rows, inputs] weight^T + bias.
extern "C" void multiply_matrix(const Matrix* m, const float* x, int64_t rows, float* out,
                                int64_t threads) {
  Scratch& memory = scratch();
  memory.reserve(rows * m->inputs, rows * m->inputs);
  const Rounded rounded = memory.rounded(rows * m->inputs);
#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(static)
    for (int64_t r = 0; r < rows; ++r) rounded.round_row(x + r * m->inputs, r, m->inputs);
    multiply(*m, rounded, rows, out);
  }
}

// Feeds one token to each session: writes its keys and values, and the logits after it.
extern "C" void decode_step(const Decoder* decoder, const Batch* batch) {
  const Decoder& d = *decoder;
  const Batch& b = *batch;
  const int64_t rows = b.rows, wide = (d.heads + 2 * d.kv_heads) * d.head_dim;
  const int64_t mixed_size = d.heads * d.head_dim;
  const int64_t inputs = rows * std::max({d.hidden, d.intermediate, mixed_size});
  Scratch& memory = scratch();
  memory.reserve(rows * (d.hidden + wide + 2 * d.intermediate + d.heads * b.capacity) +
                     inputs + 2 * inputs / kGroup, inputs);
  const Rounded rounded = memory.rounded(inputs);
  float *x = memory.take(rows * d.hidden), *qkv = memory.take(rows * wide);
  float *gate_up = memory.take(rows * 2 * d.intermediate);
  float *scores = memory.take(rows * d.heads * b.capacity), *between = memory.take(inputs);
  std::vector<Rotations> rotations;
  for (int64_t r = 0; r < rows; ++r) rotations.emplace_back(d, b, r);

  const auto normed = [&](const float* weight) {
#pragma omp for schedule(static)
    for (int64_t r = 0; r < rows; ++r) {
      rms_norm(x + r * d.hidden, weight, d.hidden, d.eps, between + r * d.hidden);
      rounded.round_row(between + r * d.hidden, r, d.hidden);
    }
  };
#pragma omp parallel num_threads(b.threads)
  {
#pragma omp for schedule(static)
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t i = 0; i < d.hidden; ++i)
        x[r * d.hidden + i] = widened(d.embedding[b.tokens[r] * d.hidden + i]);
    for (int64_t index = 0; index < d.num_layers; ++index) {
      const Layer& layer = d.layers[index];
      normed(layer.attention_norm);
      multiply(layer.qkv, rounded, rows, qkv);
#pragma omp for schedule(static) collapse(2)
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t head = 0; head < d.kv_heads; ++head)
          attend(d, b, layer, index, r, head, rotations[r], qkv + r * wide,
                 scores + (r * d.heads + head * (d.heads / d.kv_heads)) * b.capacity,
                 between + r * mixed_size);
#pragma omp for schedule(static)
      for (int64_t r = 0; r < rows; ++r)
        rounded.round_row(between + r * mixed_size, r, mixed_size);
      multiply(layer.out, rounded, rows, x, true);
      normed(layer.mlp_norm);
      multiply(layer.gate_up, rounded, rows, gate_up);
#pragma omp for schedule(static)
      for (int64_t r = 0; r < rows; ++r) {
        gated(gate_up + 2 * r * d.intermediate, d.intermediate, between + r * d.intermediate);
        rounded.round_row(between + r * d.intermediate, r, d.intermediate);
      }
      multiply(layer.down, rounded, rows, x, true);
    }
    normed(d.norm);
    multiply(d.head, rounded, rows, b.logits);
  }
}
