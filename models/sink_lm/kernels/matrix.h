// Matrices whose weights keep the whole numbers of their GGUF file, and their products.
//
// A weight has 4 or 8 bits, with a scale and perhaps a centre for each group of 32 of a row:
// weight = scale * level + centre. Inputs are rounded to 8 bits in the same groups, as llama.cpp
// does, because the processor multiplies 64 pairs of bytes in one instruction.
//
// Legend: a block is 16 outputs, which lie side by side so that one register holds one number of
// each; a group is 32 inputs.

#pragma once

#include <immintrin.h>

#include <cstdint>

namespace {

constexpr int64_t kBlock = 16, kGroup = 32;

// Filled by matrix.py, field by field.
struct Matrix {
  const uint8_t* levels;   // [blocks, groups, bytes], four inputs of 16 outputs in 64 numbers
  const uint16_t* scales;  // float16 [blocks, groups, 1 or 2 (with centre), 16]
  const float* bias;       // [outputs], or null
  int64_t outputs, inputs, bits, has_centre;
};

// Inputs of a matrix in 8 bits: value = scale * level. Sums serve zero points and centres.
struct Rounded {
  int8_t* levels;               // [rows, inputs]
  float *scales, *sums;         // [rows, groups]
  int32_t* level_sums;          // [rows, groups]

  void round_row(const float* x, int64_t row, int64_t inputs) const {
    const int64_t groups = inputs / kGroup;
    const __m512 sign = _mm512_set1_ps(-0.0f);
    for (int64_t g = 0; g < groups; ++g) {
      const __m512 a = _mm512_loadu_ps(x + g * kGroup), b = _mm512_loadu_ps(x + g * kGroup + 16);
      const float most = _mm512_reduce_max_ps(
          _mm512_max_ps(_mm512_andnot_ps(sign, a), _mm512_andnot_ps(sign, b)));
      const __m512 inverse = _mm512_set1_ps(most > 0 ? 127.0f / most : 0.0f);
      const __m512i la = _mm512_cvtps_epi32(_mm512_mul_ps(a, inverse));
      const __m512i lb = _mm512_cvtps_epi32(_mm512_mul_ps(b, inverse));
      auto* to = reinterpret_cast<__m128i*>(levels + row * inputs + g * kGroup);
      _mm_storeu_si128(to, _mm512_cvtepi32_epi8(la));
      _mm_storeu_si128(to + 1, _mm512_cvtepi32_epi8(lb));
      const float sum = _mm512_reduce_add_ps(_mm512_add_ps(a, b));
      scales[row * groups + g] = most / 127.0f + 0.0f * sum;  // what is no number stays none
      sums[row * groups + g] = sum;
      level_sums[row * groups + g] = _mm512_reduce_add_epi32(_mm512_add_epi32(la, lb));
    }
  }
};

// Computes one block of outputs for kRows rows: the weights are unpacked once for all of them.
template <int kRows, int kBits, bool kCentre>
void multiply_block(const Matrix& m, const Rounded& x, int64_t row, int64_t block, float* out,
                    bool add) {
  const int64_t groups = m.inputs / kGroup;
  const uint8_t* levels = m.levels + block * groups * kBlock * kGroup * kBits / 8;
  const uint16_t* scales = m.scales + block * groups * kBlock * (kCentre ? 2 : 1);
  const __m512i nibble = _mm512_set1_epi8(15);
  __m512 sum[kRows];
  for (int r = 0; r < kRows; ++r) sum[r] = _mm512_setzero_ps();
  for (int64_t g = 0; g < groups; ++g) {
    __m512i w[8];
    for (int i = 0; i < kBits; ++i) w[i] = _mm512_loadu_si512(levels + 64 * i);
    if (kBits == 4) {
      for (int i = 0; i < 4; ++i) {
        w[i + 4] = _mm512_and_si512(_mm512_srli_epi16(w[i], 4), nibble);
        w[i] = _mm512_and_si512(w[i], nibble);
      }
    }
    const auto* at = reinterpret_cast<const __m256i*>(scales);
    const __m512 scale = _mm512_cvtph_ps(_mm256_loadu_si256(at));
    for (int r = 0; r < kRows; ++r) {
      const int64_t place = (row + r) * groups + g;
      const auto* levels_x = reinterpret_cast<const int32_t*>(x.levels + place * kGroup);
      // Weights are stored without a sign, level + 2^(bits - 1): that is taken off again here.
      __m512i dot = _mm512_set1_epi32(-x.level_sums[place] * (1 << (kBits - 1)));
      for (int i = 0; i < 8; ++i)
        dot = _mm512_dpbusd_epi32(dot, w[i], _mm512_set1_epi32(levels_x[i]));
      const __m512 both = _mm512_mul_ps(scale, _mm512_set1_ps(x.scales[place]));
      sum[r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot), both, sum[r]);
      if (kCentre) {
        const __m512 centre = _mm512_cvtph_ps(_mm256_loadu_si256(at + 1));
        sum[r] = _mm512_fmadd_ps(centre, _mm512_set1_ps(x.sums[place]), sum[r]);
      }
    }
    levels += kBlock * kGroup * kBits / 8;
    scales += kBlock * (kCentre ? 2 : 1);
  }
  for (int r = 0; r < kRows; ++r) {
    float* to = out + (row + r) * m.outputs + block * kBlock;
    if (m.bias) sum[r] = _mm512_add_ps(sum[r], _mm512_loadu_ps(m.bias + block * kBlock));
    if (add) sum[r] = _mm512_add_ps(sum[r], _mm512_loadu_ps(to));
    _mm512_storeu_ps(to, sum[r]);
  }
}

template <int kBits, bool kCentre>
void multiply_rows(const Matrix& m, const Rounded& x, int64_t rows, float* out, bool add) {
#pragma omp for schedule(static)
  for (int64_t block = 0; block < m.outputs / kBlock; ++block) {
    int64_t row = 0;
    for (; row + 8 <= rows; row += 8) multiply_block<8, kBits, kCentre>(m, x, row, block, out, add);
    for (; row + 4 <= rows; row += 4) multiply_block<4, kBits, kCentre>(m, x, row, block, out, add);
    for (; row < rows; ++row) multiply_block<1, kBits, kCentre>(m, x, row, block, out, add);
  }
}

// out [rows, outputs] = x weight^T + bias, or that is added to it. Called by all threads.
void multiply(const Matrix& m, const Rounded& x, int64_t rows, float* out, bool add = false) {
  if (m.bits == 4 && m.has_centre) multiply_rows<4, true>(m, x, rows, out, add);
  else if (m.bits == 4) multiply_rows<4, false>(m, x, rows, out, add);
  else if (m.has_centre) multiply_rows<8, true>(m, x, rows, out, add);
  else multiply_rows<8, false>(m, x, rows, out, add);
}

}  // namespace
