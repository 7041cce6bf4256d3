"""Building the kernels: once, by anybody at any time, or a plain word why not."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType

from helpers.lm.gguf_files import finish, write_gguf
from helpers.lm.models import make_hf
from models.sink_lm.checkpoints.loading import load_model
from models.sink_lm.kernels import build
from models.sink_lm.kernels.build import NoKernels


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache, and a library that nobody has loaded."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("CXX", raising=False)
    build.library.cache_clear()
    yield tmp_path / "cache" / "rayjepa"
    build.library.cache_clear()


def made(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.iterdir()) if cache.exists() else []


@pytest.mark.usefixtures("kernels")
def test_it_is_built_once_for_a_version_of_the_source(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = build.library()
    assert made(cache) == [f"kernels-{build._version()}.so"]
    assert cache.stat().st_mode & 0o077 == 0
    build.library.cache_clear()
    monkeypatch.setenv("CXX", "false")  # nothing is compiled again
    assert build.library()._name == first._name
    monkeypatch.setattr(build, "FLAGS", (*build.FLAGS, "-g"))
    build.library.cache_clear()
    with pytest.raises(NoKernels, match="false fails"):
        build.library()


@pytest.mark.usefixtures("kernels")
def test_several_that_build_at_the_same_time_leave_one_library(cache: Path) -> None:
    builders = [threading.Thread(target=build.built) for _ in range(3)]
    for builder in builders:
        builder.start()
    for builder in builders:
        builder.join()
    assert made(cache) == [f"kernels-{build._version()}.so"]
    assert build._is_whole(cache / made(cache)[0])


def test_without_a_compiler_torch_decodes_and_the_log_says_so(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    hf = make_hf("Llama", intermediate_size=128, head_dim=32, vocab_size=112)
    hf.config.head_dim = 32
    kinds = dict.fromkeys(("attn_q", "ffn_down"), GGMLQuantizationType.Q4_0)
    finish(write_gguf(tmp_path / "model.gguf", hf, quantised=kinds))
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: True)
    monkeypatch.setenv("PATH", str(tmp_path))
    model = load_model(str(tmp_path / "model.gguf"), dtype=torch.int4)
    assert model.decode_step is None
    assert [r.getMessage() for r in caplog.records if "no C++ compiler" in r.getMessage()]
    with pytest.raises(ValueError, match=r"kernels native: .*no C\+\+ compiler.*\nTake kernels"):
        load_model(str(tmp_path / "model.gguf"), dtype=torch.int4, kernels="native")
    assert not made(cache)


@pytest.mark.parametrize("compiler", ["false", "true", "no-such-compiler", "python3 -c 1/0"])
def test_a_compiler_that_fails_is_named(
    compiler: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: True)
    monkeypatch.setenv("CXX", compiler)
    with pytest.raises(NoKernels, match=f"{compiler.split()[0]}.* fails"):
        build.library()
    assert not made(cache)


def test_a_compiler_that_hangs_is_left(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stuck = tmp_path / "stuck"
    stuck.write_text("#!/bin/sh\nexec sleep 60\n")
    stuck.chmod(0o700)
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: True)
    monkeypatch.setattr(build, "COMPILE_S", 0.2)
    monkeypatch.setenv("CXX", str(stuck))
    with pytest.raises(NoKernels, match=r"stuck fails.*timed out"):
        build.library()


def test_other_processors_are_refused_before_anything_is_built(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    with pytest.raises(NoKernels, match="AVX-512 VNNI"):
        build.library()
    assert not cache.exists()


@pytest.fixture(scope="session")
def built_before(kernels: None) -> bytes:
    return build.built().read_bytes()


@pytest.fixture
def kept(built_before: bytes, cache: Path) -> Path:
    """The library in an empty cache, without compiling it again."""
    path = cache / f"kernels-{build._version()}.so"
    path.parent.mkdir(parents=True)
    path.write_bytes(built_before)
    return path


@pytest.mark.parametrize("left", [0, 100, 4096, -1], ids=["empty", "begun", "a page", "but a byte"])
def test_a_library_that_is_cut_off_is_never_loaded(
    kept: Path, left: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert build._is_whole(kept)
    kept.write_bytes(kept.read_bytes()[:left])
    monkeypatch.setenv("CXX", "false")
    with pytest.raises(NoKernels, match="false fails"):  # it is built anew
        build.library()


def test_a_library_that_is_cut_off_is_built_anew(kept: Path) -> None:
    kept.write_bytes(kept.read_bytes()[:4096])
    assert build.library()._name == str(kept)
    assert build._is_whole(kept)


def test_a_cache_that_is_read_only_is_read(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "_keep", pytest.fail)
    monkeypatch.setattr(build, "scratch", pytest.fail)
    assert build.library()._name == str(kept)


@pytest.mark.usefixtures("kernels")
def test_a_cache_that_cannot_be_written_costs_every_process_a_build_and_says_so(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    found = build.library()
    assert found.decode_step
    assert not Path(found._name).exists()  # it is loaded, and its folder removed
    (told,) = [record.getMessage() for record in caplog.records]
    assert "every process builds its own" in told
    with pytest.raises(NoKernels, match="cannot be written"):
        build.built()


def test_no_folder_for_temporary_files_is_no_crash(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: True)

    def full(kind: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(build, "scratch", full)
    monkeypatch.setenv("CXX", "true")
    with pytest.raises(NoKernels, match="No space left"):
        build.library()


def test_what_is_no_library_of_ours_is_named() -> None:
    other = next(Path("/lib").rglob("libm.so.6"), None)
    if other is None:
        pytest.skip("needs a library of the system")
    with pytest.raises(NoKernels, match="has no multiply_matrix and no decode_step"):
        build._loaded(other)


def test_native_kernels_are_for_4_bits(tmp_path: Path) -> None:
    make_hf("Llama").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"4-bit weights only.\nTake dtype int4"):
        load_model(str(tmp_path), kernels="native")
