"""Fetching from a hub that serves the published layout: what comes, where it goes, and what a bad line does to it."""

from __future__ import annotations

import errno
import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import TYPE_CHECKING

import pytest

from runner.errors import ConfigInvalid, StorageDenied, StorageFull, StorageUnavailable, WeightsCorrupt, WeightsMissing
from runner.spec.recipes import RECIPES, get_recipe
from runner.weights import fetch, hub, repositories
from runner.weights.digests import recorded
from runner.weights.fetch import fetch_weights
from runner.weights.repositories import LORA_COMMIT, LORA_REPO, SOURCES, Pin
from runner.weights.resolved import ResolvedRecipe, resolve_recipe
from runner.weights.store import ModelStore
from runner.weights.verify import verify_weights

if TYPE_CHECKING:
    from tests.hub_server import HubServer  # at run time it is a plugin, which pytest imports itself


DIFFUSERS, ORIGINAL = SOURCES["components"].repo, SOURCES["preprocess"].repo
FOLDER = SOURCES["components"].folder
DETECTOR = "process_checkpoint/det/yolov10m.onnx"
LORA = SOURCES["distill-lora"].files[0]
CHUNK = 16 * 1024


def noise(size: int, seed: int) -> bytes:
    return random.Random(seed).randbytes(size)


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """No pauses between attempts, small blocks, and none of this machine's own set-up of the hub."""
    for name in ("HF_ENDPOINT", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(hub, "FIRST_WAIT_S", 0.0)
    monkeypatch.setattr("huggingface_hub.file_download.time", SimpleNamespace(sleep=lambda _s: None, time=time.time))
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", CHUNK)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_IMPLICIT_TOKEN", True)


@pytest.fixture
def published(hub_server: HubServer) -> HubServer:
    """The three repositories in small: the same paths, other bytes, and the pickles that lie among them."""
    hub_server.add(
        DIFFUSERS,
        {
            "README.md": b"a card",
            "model_index.json": b"{}",
            "vae/config.json": b'{"vae": 1}',
            "vae/diffusion_pytorch_model.safetensors": noise(300_000, 1),
            "text_encoder/model.safetensors": noise(50_000, 2),
            "text_encoder/pytorch_model.bin": noise(50_000, 3),
            "transformer/config.json": b'{"transformer": 1}',
            "transformer/diffusion_pytorch_model.safetensors": noise(700_000, 4),
        },
    )
    hub_server.add(
        ORIGINAL,
        {
            "Wan2.1_VAE.pth": noise(5000, 5),
            "relighting_lora.ckpt": noise(5000, 6),
            DETECTOR: noise(9000, 7),
            "process_checkpoint/sam2/sam2_hiera_large.pt": noise(5000, 8),
            "process_checkpoint/pose2d/vitpose_h_wholebody.onnx/end2end.onnx": noise(6000, 9),
            "process_checkpoint/pose2d/vitpose_h_wholebody.onnx/onnx__MatMul_1": noise(100, 10),
        },
    )
    return hub_server


def run(server: HubServer, models: Path, recipe: str = "bf16", **options: object) -> fetch.Fetched:
    options = {"say": lambda _line: None} | options
    return fetch_weights(models, recipe, endpoint=server.endpoint, **options)  # type: ignore[arg-type]


def tree(folder: Path) -> dict[str, bytes]:
    """The models below `folder`: nothing hidden."""
    files = {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    return {str(p): body for p, body in files.items() if not any(part.startswith(".") for part in p.parts)}


def wanted(server: HubServer, *, transformer: bool = True) -> dict[str, bytes]:
    """What a fetch should have brought, said independently of the table's patterns."""
    diffusers = {
        f"{FOLDER}/{path}": body
        for path, body in server.repos[DIFFUSERS].files.items()
        if path != "README.md" and not path.endswith(".bin")
        if transformer or path != "transformer/diffusion_pytorch_model.safetensors"
    }
    original = server.repos[ORIGINAL].files
    return diffusers | {path: original[path] for path in original if path == DETECTOR or "/pose2d/" in path}


def test_fetch_gets_files_of_recipe_and_no_pickle(published: HubServer, tmp_path: Path) -> None:
    got = run(published, tmp_path / "models")
    assert tree(tmp_path / "models") == wanted(published)
    assert (got.files, got.downloaded) == (9, 9)
    assert got.bytes == got.downloaded_bytes == sum(len(b) for b in wanted(published).values())
    assert got.commits[DIFFUSERS] == published.repos[DIFFUSERS].commit
    assert not [r.path for r in published.bodies() if r.path.endswith(repositories.PICKLED)]


def test_second_fetch_requests_no_file(published: HubServer, tmp_path: Path) -> None:
    run(published, tmp_path)
    published.requests.clear()
    got = run(published, tmp_path)
    assert (got.downloaded, got.downloaded_bytes, published.bodies()) == (0, 0, [])


def test_fetch_records_are_accepted_by_hub_client(published: HubServer, tmp_path: Path) -> None:
    """The unmodified client finds its own records beside our files and fetches nothing; and identity.py reads them."""
    import huggingface_hub

    run(published, tmp_path)
    published.requests.clear()
    with hub.online(lambda _line: None):
        commit = published.repos[DIFFUSERS].commit
        for name in ("vae/diffusion_pytorch_model.safetensors", "vae/config.json"):
            path = huggingface_hub.hf_hub_download(
                DIFFUSERS, name, local_dir=tmp_path / FOLDER, endpoint=published.endpoint, revision=commit, token=False
            )
            assert Path(path).read_bytes() == published.repos[DIFFUSERS].files[name]
    assert published.bodies() == []
    weights = tmp_path / FOLDER / "vae/diffusion_pytorch_model.safetensors"
    detector = tmp_path / DETECTOR
    assert recorded(detector, tmp_path) == hashlib.sha256(detector.read_bytes()).hexdigest()
    assert hub.read_record(tmp_path / FOLDER, "vae/diffusion_pytorch_model.safetensors") == (
        commit,
        hashlib.sha256(weights.read_bytes()).hexdigest(),
    )


def test_hub_server_fixture_serves_hub_client(published: HubServer, tmp_path: Path) -> None:
    """The hub's own client downloads from the fixture what our fetch does."""
    import huggingface_hub

    with hub.online(lambda _line: None):
        huggingface_hub.snapshot_download(
            DIFFUSERS,
            local_dir=tmp_path / "theirs",
            endpoint=published.endpoint,
            token=False,
            ignore_patterns=["*.bin", "README.md"],
        )
    run(published, tmp_path / "ours", parts=["components", "transformer"])
    assert tree(tmp_path / "theirs") == tree(tmp_path / "ours" / FOLDER)


def test_fetch_prints_licence_size_and_commit_before_first_file(published: HubServer, tmp_path: Path) -> None:
    lines: list[tuple[str, int]] = []
    run(published, tmp_path, say=lambda line: lines.append((line, len(published.bodies()))))
    text = "\n".join(line for line, bodies in lines if bodies == 0)
    assert "licence: Apache-2.0 (the hub's card: apache-2.0)" in text
    assert "AGPL-3.0" in text
    assert f"{DIFFUSERS}@{published.repos[DIFFUSERS].commit[:12]}, 5 files" in text


def test_fetch_with_dry_run_downloads_nothing(published: HubServer, tmp_path: Path) -> None:
    got = run(published, tmp_path / "models", dry_run=True)
    assert (got.files, got.bytes) == (9, sum(len(b) for b in wanted(published).values()))
    assert published.bodies() == []
    assert not (tmp_path / "models").exists()


def test_fetch_with_offline_setting_reports_overrides_and_restores_setting(
    published: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    lines: list[str] = []
    run(published, tmp_path, say=lines.append)
    assert "HF_HUB_OFFLINE" in lines[0]
    assert constants.HF_HUB_OFFLINE is True


def test_fetch_endpoint_comes_from_environment(
    published: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", published.endpoint + "/")
    fetch_weights(tmp_path, "bf16", parts=["preprocess"], say=lambda _line: None)
    assert (tmp_path / DETECTOR).is_file()


@pytest.fixture
def lora_pin(hub_server: HubServer, monkeypatch: pytest.MonkeyPatch) -> bytes:
    """The distill LoRA's repository, and a table that pins the small file in its place."""
    body = noise(20_000, 11)
    hub_server.add(LORA_REPO, {LORA: body, "LoRAs/other.safetensors": b"x"}).commit = LORA_COMMIT
    pins = {Path(LORA).name: Pin(len(body), hashlib.sha256(body).hexdigest())}
    small = {**SOURCES, "distill-lora": replace(SOURCES["distill-lora"], pins=pins)}
    monkeypatch.setattr(repositories, "SOURCES", MappingProxyType(small))
    return body


def test_fetch_of_lora_stores_flat_file_of_pinned_commit(
    hub_server: HubServer, lora_pin: bytes, tmp_path: Path
) -> None:
    run(hub_server, tmp_path, parts=["distill-lora"])
    assert tree(tmp_path) == {f"distill_lora/{Path(LORA).name}": lora_pin}
    assert all(LORA_COMMIT in request.path for request in hub_server.requests)


def test_fetch_of_other_file_under_pinned_name_is_refused_early(
    hub_server: HubServer, lora_pin: bytes, tmp_path: Path
) -> None:
    hub_server.repos[LORA_REPO].files[LORA] = lora_pin[:-1] + bytes([lora_pin[-1] ^ 1])
    with pytest.raises(WeightsCorrupt, match="not the known file"):
        run(hub_server, tmp_path, parts=["distill-lora"])
    assert hub_server.bodies() == []


def test_parts_of_recipe_are_expected_parts() -> None:
    assert "transformer" in repositories.parts_of(RECIPES["bf16"])
    assert "transformer" not in repositories.parts_of("fp4-distill+fp8")
    assert {"fp4", "distill-lora"} <= set(repositories.parts_of("fp4-distill"))
    assert "distill-lora" not in repositories.parts_of("fp4")
    assert repositories.parts_of("fp4-distill+svdq-int4") == ("components", "transformer", "preprocess", "distill-lora")
    assert repositories.parts_of(get_recipe("fp4+svdq-nvfp4")) == ("components", "transformer", "preprocess")
    with pytest.raises(ConfigInvalid, match="did you mean 'bf16'"):
        repositories.parts_of("bf61")
    with pytest.raises(ConfigInvalid, match="no part 'lora'"):
        repositories.sources_of("bf16", ["lora"])


def test_fetch_of_fp4_gets_config_but_not_source_transformer(published: HubServer, tmp_path: Path) -> None:
    seed = {
        "Wan2.2-Animate-14B-FP4/quantized_transformer.safetensors": noise(8000, 12),
        "Wan2.2-Animate-14B-FP4/quantize_config.json": b"{}",
        "Wan2.2-Animate-14B-FP4/quantized_text_encoder.safetensors": noise(8000, 13),
    }
    published.add(SOURCES["fp4"].repo, seed)
    run(published, tmp_path, "fp4")
    fp4 = {path: body for path, body in seed.items() if "text_encoder" not in path}
    assert tree(tmp_path) == wanted(published, transformer=False) | fp4


def test_fetch_of_svdq_recipe_gets_source_transformer(published: HubServer, lora_pin: bytes, tmp_path: Path) -> None:
    said: list[str] = []
    run(published, tmp_path, "fp4-distill+svdq-int4", say=said.append)
    lora = {f"distill_lora/{Path(LORA).name}": lora_pin}
    assert tree(tmp_path) == wanted(published) | lora
    assert "no published transformer in svdq-int4. Its source is fetched" in said[0]
    assert said[1].strip() == "video-lab quantize --recipe fp4-distill --format svdq-int4"


@pytest.mark.parametrize(("folder", "needs_lora"), [("distill", False), ("plain", True)])
def test_fetch_with_svdq_file_present_gets_no_source(
    published: HubServer, lora_pin: bytes, tmp_path: Path, folder: str, needs_lora: bool
) -> None:
    name = f"Wan2.2-Animate-14B-SVDQ-INT4-{folder}/quantized_transformer.safetensors"
    (tmp_path / name).parent.mkdir()
    (tmp_path / name).write_bytes(b"made here")
    said: list[str] = []
    run(published, tmp_path, "fp4-distill+svdq-int4", say=said.append)
    lora = {f"distill_lora/{Path(LORA).name}": lora_pin} if needs_lora else {}
    assert tree(tmp_path) == wanted(published, transformer=False) | lora | {name: b"made here"}
    assert said[0] == f"{name} is there: the source that it was made from is not fetched"
    run(published, tmp_path, "fp4-distill+svdq-int4", parts=["transformer"])  # asked for by name, it comes
    assert tree(tmp_path) == wanted(published) | lora | {name: b"made here"}


@pytest.mark.parametrize("kind", ["503", "drop", "cut"])
def test_fetch_with_transfer_fault_is_retried(published: HubServer, tmp_path: Path, kind: str) -> None:
    published.fail(kind, "vae/diffusion_pytorch_model", times=2)
    published.fail("503", f"/api/models/{DIFFUSERS}")
    run(published, tmp_path)
    assert tree(tmp_path) == wanted(published)


def test_fetch_with_cut_connection_resumes_at_break(published: HubServer, tmp_path: Path) -> None:
    published.fail("cut", "vae/diffusion_pytorch_model", times=1)
    run(published, tmp_path, parts=["components"])
    stored = [r.range for r in published.bodies("vae/diffusion_pytorch_model") if r.storage]
    assert len(stored) == 2
    assert stored[0] is None
    assert stored[1] is not None
    assert int(stored[1].removeprefix("bytes=").removesuffix("-")) >= 150_000 - CHUNK


def test_fetch_that_gave_up_resumes_at_next_run(
    published: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "ATTEMPTS", 1)
    name = "vae/diffusion_pytorch_model"
    published.fail("cut", name)
    published.fail("drop", name, times=6)  # as often as the library reconnects, and once more
    with pytest.raises(StorageUnavailable) as failure:
        run(published, tmp_path)
    assert (failure.value.exit_code, failure.value.retryable) == (3, True)
    assert not (tmp_path / FOLDER / f"{name}.safetensors").exists()
    published.requests.clear()
    published.faults.clear()
    run(published, tmp_path)
    assert tree(tmp_path) == wanted(published)
    (again,) = [r for r in published.bodies(name) if r.storage]
    assert again.range is not None


def test_fetch_from_server_without_ranges_gets_whole_file(published: HubServer, tmp_path: Path) -> None:
    published.ranges = False
    published.fail("cut", "vae/diffusion_pytorch_model")
    got = run(published, tmp_path)
    assert tree(tmp_path) == wanted(published)
    assert got.downloaded_bytes == got.bytes  # what was dropped is not counted


def test_killed_fetch_leaves_part_file_that_is_resumed(hub_server: HubServer, tmp_path: Path) -> None:
    body = noise(24_000_000, 14)  # the library writes 10 MB at a time
    hub_server.add(ORIGINAL, {DETECTOR: body})
    hub_server.fail("stall", DETECTOR)
    code = (
        "from pathlib import Path; from runner.weights.fetch import fetch_weights\n"
        f"fetch_weights(Path({str(tmp_path)!r}), 'bf16', parts=['preprocess'], endpoint={hub_server.endpoint!r})"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        parts: list[Path] = []
        deadline = time.monotonic() + 60
        while not any(part.stat().st_size for part in parts) and time.monotonic() < deadline:
            time.sleep(0.05)
            parts = list(tmp_path.rglob("*.incomplete"))
            assert process.poll() is None
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not (tmp_path / DETECTOR).exists()
    there = parts[0].stat().st_size
    assert there > 0
    run(hub_server, tmp_path, parts=["preprocess"])
    assert (tmp_path / DETECTOR).read_bytes() == body
    assert [r.range for r in hub_server.bodies() if r.storage] == [None, f"bytes={there}-"]
    assert list(tmp_path.rglob("*.incomplete")) == []


def test_fetch_with_flipped_bit_downloads_again(published: HubServer, tmp_path: Path) -> None:
    published.fail("flip", DETECTOR)
    run(published, tmp_path)
    assert tree(tmp_path) == wanted(published)


@pytest.mark.parametrize("name", [DETECTOR, "vae/config.json"])
def test_fetch_with_lasting_wrong_checksum_leaves_no_file(published: HubServer, tmp_path: Path, name: str) -> None:
    published.fail("flip", name, times=99)
    with pytest.raises(WeightsCorrupt, match="checksum"):
        run(published, tmp_path)
    assert not list(tmp_path.rglob(Path(name).name if name == DETECTOR else "vae/config.json"))


def test_fetch_replaces_damaged_file_and_keeps_intact_one(published: HubServer, tmp_path: Path) -> None:
    detector = tmp_path / DETECTOR
    detector.parent.mkdir(parents=True)
    detector.write_bytes(published.repos[ORIGINAL].files[DETECTOR])
    vae = tmp_path / FOLDER / "vae/diffusion_pytorch_model.safetensors"
    vae.parent.mkdir(parents=True)
    vae.write_bytes(published.repos[DIFFUSERS].files["vae/diffusion_pytorch_model.safetensors"][:1000])
    run(published, tmp_path)
    assert tree(tmp_path) == wanted(published)
    assert published.bodies(DETECTOR) == []
    assert recorded(detector, tmp_path) == hashlib.sha256(detector.read_bytes()).hexdigest()


def test_fetch_replaces_file_edited_after_download(published: HubServer, tmp_path: Path) -> None:
    run(published, tmp_path)
    vae = tmp_path / FOLDER / "vae/diffusion_pytorch_model.safetensors"
    body = bytearray(vae.read_bytes())
    body[1000] ^= 1
    vae.write_bytes(body)
    os.utime(vae, (time.time() + 60, time.time() + 60))
    assert run(published, tmp_path).downloaded == 1
    assert tree(tmp_path) == wanted(published)


def test_fetch_of_gated_repository_names_page_and_works_with_token(published: HubServer, tmp_path: Path) -> None:
    published.repos[DIFFUSERS].gated = True
    with pytest.raises(StorageDenied, match="gated") as failure:
        run(published, tmp_path)
    assert f"{published.endpoint}/{DIFFUSERS}" in failure.value.message
    assert failure.value.exit_code == 2
    run(published, tmp_path, token=published.token)
    assert tree(tmp_path) == wanted(published)
    assert not any(r.authorized for r in published.requests if r.storage)  # the token stays with the hub


def test_fetch_token_comes_from_environment(
    published: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_IMPLICIT_TOKEN", False)
    monkeypatch.setenv("HF_TOKEN", published.token)
    published.repos[DIFFUSERS].private = True
    run(published, tmp_path)
    assert tree(tmp_path) == wanted(published)


def test_fetch_of_private_is_denied_and_of_absent_is_weights_missing(published: HubServer, tmp_path: Path) -> None:
    published.repos[DIFFUSERS].private = True
    with pytest.raises(StorageDenied, match="private, gated, or does not exist"):
        run(published, tmp_path)
    with pytest.raises(WeightsMissing, match="no such revision"):
        run(published, tmp_path, token=published.token, revisions={DIFFUSERS: "v9"})
    del published.repos[DIFFUSERS]
    with pytest.raises(WeightsMissing, match="404"):
        run(published, tmp_path, token=published.token)


def test_fetch_from_repository_without_files_names_them(published: HubServer, tmp_path: Path) -> None:
    published.repos[ORIGINAL].files = {"Wan2.1_VAE.pth": b"x"}
    with pytest.raises(WeightsMissing, match=r"process_checkpoint/det/yolov10m\.onnx"):
        run(published, tmp_path)
    assert published.bodies() == []


def test_fetch_without_network_is_storage_unavailable(tmp_path: Path) -> None:
    with pytest.raises(StorageUnavailable, match="the same command resumes"):
        fetch_weights(tmp_path, "bf16", endpoint="http://127.0.0.1:9", say=lambda _line: None)


def test_fetch_endpoint_that_is_no_hub_is_config_invalid(hub_server: HubServer, tmp_path: Path) -> None:
    hub_server.add(DIFFUSERS, {"vae/x.json": b"{}"}).commit = ""
    with pytest.raises(ConfigInvalid, match="HF_ENDPOINT"):
        run(hub_server, tmp_path, parts=["components"])
    with pytest.raises(ConfigInvalid, match="not an http"):
        fetch_weights(tmp_path, "bf16", endpoint="huggingface", say=lambda _line: None)


def test_fetch_with_listing_outside_store_is_refused(hub_server: HubServer, tmp_path: Path) -> None:
    hub_server.add(ORIGINAL, {"process_checkpoint/pose2d/../../../evil": b"x"})
    with pytest.raises(ConfigInvalid, match="leads out"):
        run(hub_server, tmp_path / "models", parts=["preprocess"])
    assert not (tmp_path / "evil").exists()


def test_fetch_to_small_disk_is_refused_before_first_byte(
    published: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch.shutil, "disk_usage", lambda _path: SimpleNamespace(free=1_000_000))
    with pytest.raises(StorageFull, match=r"1\.1 GB|0\.0 GB"):
        run(published, tmp_path)
    assert published.bodies() == []


def test_fetch_with_disk_that_fills_up_is_storage_full(
    published: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("huggingface_hub.file_download.http_get", full)
    with pytest.raises(StorageFull):
        run(published, tmp_path)


def test_interrupted_fetch_stops_workers_and_can_resume(
    published: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(fetch, "wait", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(published, tmp_path)
    whole = wanted(published)
    assert all(whole[path] == body for path, body in tree(tmp_path).items())
    run(published, tmp_path)
    assert tree(tmp_path) == whole


def test_fetch_progress_of_stopped_worker_raises_at_next_block() -> None:
    progress = fetch._FetchProgress(100)
    progress.add(10)
    progress.stopped.set()
    with pytest.raises(fetch._Stopped):
        progress.add(10)
    assert progress.done == 10


def test_fetched_store_is_accepted_by_recipe(hub_server: HubServer, tmp_path: Path, demo_models: Path) -> None:
    """Real files of every component, checked by the store itself."""
    files = {p.relative_to(demo_models).as_posix(): p.read_bytes() for p in demo_models.rglob("*") if p.is_file()}
    diffusers = {path.removeprefix(f"{FOLDER}/"): body for path, body in files.items() if path.startswith(FOLDER)}
    hub_server.add(DIFFUSERS, diffusers)
    hub_server.add(ORIGINAL, {path: body for path, body in files.items() if path.startswith("process_checkpoint/")})
    with pytest.raises(WeightsMissing):
        resolve_recipe(ModelStore(tmp_path / "models"), RECIPES["bf16"])
    run(hub_server, tmp_path / "models")
    store = ModelStore(tmp_path / "models")
    ours = resolve_recipe(store, RECIPES["bf16"])
    assert ours.digests == ResolvedRecipe(ModelStore(demo_models), RECIPES["bf16"]).digests
    assert {row.status for row in verify_weights(tmp_path / "models", "bf16")} == {"ok"}
