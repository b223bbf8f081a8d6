"""Int8: a network of matrix products finds the same points; what has nothing to gain stays, and says so."""

import json
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import pytest

from runner.errors import ConfigInvalid, StorageDenied, WeightsCorrupt
from runner.preprocess.networks import int8
from runner.preprocess.networks.backends import open_backend
from runner.preprocess.networks.int8 import int8_key, make_int8, model_files
from runner.preprocess.networks.providers import NetworkOptions
from runner.preprocess.networks.sessions import Network, open_network
from runner.preprocess.networks.vitpose import PoseEstimator
from runner.preprocess.networks.yolov10 import Box
from runner.preprocess.pose_cache import network_parts
from runner.preprocess.prepare import Preprocessor
from runner.spec.options import JobOptions
from tests.preprocess.conftest import disc_frame
from tests.preprocess.tiny_dwpose import build_simcc, build_yolox
from tests.preprocess.tiny_networks import build_detector, build_pose, build_product_pose

CENTRES = [(60, 60), (90, 50), (120, 70)]


def opened(path: Path, folder: Path) -> Network:
    return open_network(path, options=NetworkOptions(folder=folder), precision="int8")


def points(network: Network) -> np.ndarray:
    frames = np.stack([disc_frame(centre) for centre in CENTRES])
    boxes = [Box(x - 24, y - 24, x + 24, y + 24, 0.9) for x, y in CENTRES]
    return PoseEstimator(network).points(frames, boxes)


@pytest.fixture(scope="module")
def products(tmp_path_factory) -> Path:
    return build_product_pose(tmp_path_factory.mktemp("products") / "pose.onnx")


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.mark.parametrize("half", [False, True])
def test_int8_pose_network_finds_same_points(products, cache, half, tmp_path):
    path = build_product_pose(tmp_path / "half.onnx", half=True) if half else products
    plain, ours = open_network(path), opened(path, cache)
    made, _ = make_int8(path, cache)
    kinds = [node.op_type for node in onnx.load(str(made / "end2end.onnx")).graph.node]
    assert kinds.count("MatMulInteger") == 2
    assert "MatMul" not in kinds
    expected, got = points(plain), points(ours)
    assert np.abs(expected[:, 0, :2] - CENTRES).max() < 1  # the joint without a shift is the disc's centre
    assert 0 < np.abs(got[..., :2] - expected[..., :2]).max() < 0.6  # a heatmap pixel is 1.25 of the frame's here
    assert np.abs(got[..., 2] - expected[..., 2]).max() < 0.02


def test_int8_weights_use_7_bits_to_avoid_saturation(products, cache):
    made, _ = make_int8(products, cache)
    weights = [
        onnx.numpy_helper.to_array(item)
        for item in onnx.load(str(made / "end2end.onnx")).graph.initializer
        if item.name.endswith("_quantized")
    ]
    assert [w.dtype for w in weights] == [np.int8, np.int8]
    assert max(np.abs(w.astype(int)).max() for w in weights) * 255 * 2 < 2**15


def test_int8_precision_is_in_record_and_pose_cache_key(products, cache):
    plain, ours = open_network(products), opened(products, cache)
    assert (ours.precision, ours.path) == ("int8", products)
    assert ours.description["precision"] == "int8"
    assert ours.description["precision_why"].startswith("98% of its weights as 8-bit integers, outputs correlate ")
    assert plain.description["precision"] == "fp32" and "precision_why" not in plain.description
    assert network_parts(ours) != network_parts(plain)
    assert network_parts(ours)["sha256"] == network_parts(plain)["sha256"]


def test_make_int8_converts_once_for_many_threads_and_later_without_onnx(tmp_path, products, monkeypatch):
    made: list[Path] = []
    real = int8._convert
    monkeypatch.setattr(int8, "_convert", lambda graph, *rest: made.append(graph) or real(graph, *rest))
    with ThreadPoolExecutor(4) as pool:
        folders = set(pool.map(lambda _: make_int8(products, tmp_path)[0], range(4)))
    assert len(folders) == len(made) == 1
    monkeypatch.setitem(sys.modules, "onnx", None)
    assert make_int8(products, tmp_path)[0] in folders
    copy = build_copy(products, tmp_path / "elsewhere" / "renamed.onnx")
    with pytest.raises(ConfigInvalid, match=r"package onnx.*video-lab-runner\[int8\]"):
        make_int8(copy, tmp_path / "new")
    assert [path.name for path in (tmp_path / "new" / "int8").iterdir() if path.is_dir()] == []


def build_copy(source: Path, target: Path) -> Path:
    target.parent.mkdir(parents=True)
    return Path(shutil.copy(source, target))


def test_int8_of_graph_with_external_weights_depends_on_them(products, tmp_path):
    folder = tmp_path / "store" / "vitpose_h_wholebody.onnx"
    folder.mkdir(parents=True)
    onnx.save(
        onnx.load(str(products)),
        str(folder / "end2end.onnx"),
        save_as_external_data=True,
        all_tensors_to_one_file=False,
        size_threshold=100,  # smaller than ours when we fold
    )
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert len(before) > 2
    assert model_files(folder / "end2end.onnx") == sorted(folder.iterdir())
    key = int8_key(folder / "end2end.onnx")
    ours = opened(folder, tmp_path)
    assert ours.precision == "int8" and ours.description["model"] == folder.name
    np.testing.assert_allclose(points(ours), points(opened(products, tmp_path)), atol=1e-3)
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before  # a store is read, never written
    # other weights under the same graph are another model, for the pose cache too
    plain = network_parts(open_network(folder / "end2end.onnx"))
    weights = max(folder.iterdir(), key=lambda path: path.stat().st_size if path.suffix != ".onnx" else 0)
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert int8_key(folder / "end2end.onnx") != key
    assert network_parts(open_network(folder / "end2end.onnx")) != plain


def test_make_int8_of_large_model_stores_weights_beside_graph(products, tmp_path, monkeypatch):
    monkeypatch.setattr(int8, "EXTERNAL", 1000)
    made, _ = make_int8(products, tmp_path)
    names = {path.name for path in made.iterdir()}
    assert "end2end.onnx" in names and len(names) == 3  # the graph, its data, the notes
    monkeypatch.undo()
    np.testing.assert_array_equal(points(opened(products, tmp_path)), points(opened(products, tmp_path / "one file")))


def test_model_files_of_repacked_graph_include_its_data_file_only(tmp_path):
    graph = tmp_path / "vitpose_h_wholebody_model.onnx"
    for name in (graph.name, "vitpose_h_wholebody_data.bin", "yolov10m.onnx", "yolov10m.txt", ".vitpose_h_wholebody.x"):
        (tmp_path / name).write_bytes(b"x")
    assert [path.name for path in model_files(graph)] == ["vitpose_h_wholebody_data.bin", graph.name]


def test_make_int8_removes_scratch_folder_and_replaces_torn_result(products, tmp_path):
    made, _ = make_int8(products, tmp_path)
    left = made.parent / f".making-{made.name[:16]}-x"
    left.mkdir()
    (left / "folded.onnx").write_bytes(b"half")
    (made / "int8.json").unlink()
    (made / "end2end.onnx").write_bytes(b"torn")
    assert make_int8(products, tmp_path)[0] == made
    assert not left.exists()
    assert points(opened(products, tmp_path)).shape == (3, 133, 3)


def test_int8_of_convolutional_pose_network_stays_fp32_with_warning(networks, make_clip, reference, tmp_path):
    options = NetworkOptions(pose_precision="int8", folder=tmp_path)
    preprocessor = Preprocessor.load(*networks, networks=options)
    assert preprocessor.description["pose"]["precision"] == "fp32"
    assert "0% of its weights are in matrix products" in preprocessor.description["pose"]["precision_why"]
    assert "precision_why" not in preprocessor.description["detector"]  # nobody asked that of a detector
    (notes,) = (tmp_path / "int8").glob("*/int8.json")
    assert json.loads(notes.read_text())["int8"] is False
    clip = make_clip(tmp_path / "clip.mp4", CENTRES)
    conditions = preprocessor.prepare(reference, clip, JobOptions(size="96x64"), face_size=32)
    assert conditions.report["pose_precision"] == "fp32"
    (warning,) = [text for text in conditions.report["warnings"] if "int8" in text]
    assert warning.startswith("pose.onnx runs in fp32, not int8: only 0%")
    conditions.close()


def test_prepare_with_int8_pose_network_finds_poses(products, networks, make_clip, reference, tmp_path):
    options = NetworkOptions(pose_precision="int8", folder=tmp_path)
    backend = open_backend("vitpose", networks[0], products, options=options)
    assert (backend.detector.network.precision, backend.pose.network.precision) == ("fp32", "int8")
    preprocessor = Preprocessor(backend.detector, backend.pose, networks=options)
    walk = [(60 + 4 * i, 60) for i in range(6)]
    clip = make_clip(tmp_path / "clip.mp4", walk)
    conditions = preprocessor.prepare(reference, clip, JobOptions(size="96x64"), face_size=32)
    assert conditions.report["pose_precision"] == "int8"
    assert not [text for text in conditions.report["warnings"] if "int8" in text]
    assert np.abs(conditions.track.points[:, 0, :2] - walk).max() < 1.5
    conditions.close()


def test_int8_of_dwpose_stays_fp32(tmp_path):
    files = build_yolox(tmp_path / "yolox_l.onnx"), build_simcc(tmp_path / "dw-ll_ucoco_384.onnx")
    backend = open_backend("dwpose", *files, options=NetworkOptions(pose_precision="int8", folder=tmp_path / "cache"))
    assert backend.pose.network.precision == "fp32"
    assert "matrix products" in backend.description["pose"]["precision_why"]


def test_int8_on_gpu_or_without_cache_is_refused(products, tmp_path):
    with pytest.raises(ConfigInvalid, match=r"CPU only, but the device is cuda.*fp32"):
        open_network(products, "cuda", NetworkOptions(folder=tmp_path), precision="int8")
    with pytest.raises(ConfigInvalid, match="int8 networks run on the CPU only"):  # before a detector is looked for
        open_backend("vitpose", tmp_path / "none", products, "cuda", NetworkOptions("int8", folder=tmp_path))
    with pytest.raises(ConfigInvalid, match="--cache"):
        open_network(products, precision="int8")
    (tmp_path / "file").touch()
    with pytest.raises((ConfigInvalid, StorageDenied), match="file"):
        make_int8(products, tmp_path / "file")


def test_make_int8_of_damaged_graph_or_with_other_outputs_is_weights_corrupt(products, tmp_path, monkeypatch):
    torn = tmp_path / "torn.onnx"
    torn.write_bytes(products.read_bytes()[:3000])
    with pytest.raises(WeightsCorrupt, match="Fetch it again"):
        make_int8(torn, tmp_path)
    monkeypatch.setattr(int8, "LEAST_AGREEMENT", 1.1)
    with pytest.raises(WeightsCorrupt, match=r"gives other outputs \(correlation 1\.000.*--pose-precision fp32"):
        make_int8(products, tmp_path)
    assert not [path for path in (tmp_path / "int8").iterdir() if path.is_dir()]  # neither result nor scratch


@pytest.mark.parametrize("build", [build_detector, build_pose])
def test_share_of_products_of_convolutional_network_is_0(build, tmp_path):
    graph = onnx.load(str(build(tmp_path / "n.onnx"))).graph
    assert int8._share_of_products(graph) == 0


@pytest.mark.real
def test_int8_of_real_networks_stays_fp32(real_data, tmp_path):
    """Measured: their 8-bit convolutions take two to eight times the time, and they find no person."""
    for name in ("wholebody_pose_full.onnx", "person_detector.onnx"):
        network = opened(real_data / name, tmp_path)
        assert network.precision == "fp32"
        assert "8-bit convolutions are slower" in network.precision_why
