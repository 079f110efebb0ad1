"""Networks by name: the three of their papers, and those of torchvision, timm and transformers."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from cachefreeze import UserError, units_of
from cachefreeze.models import IMAGENET, build, weights_statistics

SMALL = {
    "wrn": {"depth": 16, "width": 1},
    "densenet": {"depth": 22, "growth_rate": 4},
    "vgg": {"depth": 11},
}


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("arch", "sizes", "classes", "millions"),
    [
        ("wrn", {"depth": 40, "width": 4}, 10, 8.9),  # table 4 of the WRN paper
        ("wrn", {"depth": 28, "width": 10}, 10, 36.5),
        ("wrn", {"depth": 16, "width": 8}, 10, 11.0),
        ("densenet", {"depth": 100, "growth_rate": 12}, 10, 0.8),  # table 2 of the DenseNet paper
        ("densenet", {"depth": 40, "growth_rate": 12, "bottleneck": False}, 10, 1.0),
        ("densenet", {"depth": 250, "growth_rate": 24}, 10, 15.3),
        # 14.71 M in the 13 convolutions (table 2 of the VGG paper, less its large head),
        # 0.53 M in the head.
        ("vgg", {"depth": 16}, 10, 15.2),
    ],
)
def test_the_published_networks_have_their_published_sizes(
    arch: str, sizes: dict[str, int], classes: int, millions: float
) -> None:
    with torch.device("meta"):
        model = build(arch, classes, **sizes)  # type: ignore[arg-type]
    assert parameters(model) / 1e6 == pytest.approx(millions, abs=0.06)


@pytest.mark.parametrize("arch", SMALL)
@pytest.mark.parametrize("size", [32, 48])
def test_the_three_networks_take_images_of_several_sizes(arch: str, size: int) -> None:
    model = build(arch, 7, **SMALL[arch]).eval()  # type: ignore[arg-type]
    assert model(torch.randn(2, 3, size, size)).shape == (2, 7)


@pytest.mark.parametrize(
    ("arch", "sizes"),
    [
        ("wrn", {"depth": 17, "width": 2}),
        ("wrn", {"depth": 4, "width": 2}),
        ("wrn", {"depth": 16, "width": 0}),
        ("densenet", {"depth": 41, "growth_rate": 12}),
        ("densenet", {"depth": 42, "growth_rate": 12, "bottleneck": False}),
        ("densenet", {"depth": 40, "growth_rate": 0}),
        ("vgg", {"depth": 12}),
    ],
)
def test_sizes_that_do_not_fit_are_refused_with_examples(arch: str, sizes: dict[str, int]) -> None:
    with pytest.raises(UserError, match=r"does not fit .*: use"):
        build(arch, 10, **sizes)  # type: ignore[arg-type]


@pytest.mark.parametrize("arch", ["torchvision:vit_b_16", "timm:vit_tiny_patch16_224"])
def test_ready_made_networks_take_images_of_the_size_that_is_asked_for(arch: str) -> None:
    if arch.startswith("timm"):
        pytest.importorskip("timm")
    with torch.device("meta"):
        model = build(arch, 7, image_size=64)
        assert model.eval()(torch.zeros(2, 3, 64, 64)).shape == (2, 7)


def test_a_size_that_patches_do_not_fill_is_refused() -> None:
    with pytest.raises(UserError, match="does not take images of 70x70"):
        build("torchvision:vit_b_16", 7, image_size=70)


@pytest.mark.parametrize(
    ("arch", "sentence"),
    [
        ("torchvision:resnet19", "torchvision has no network 'resnet19' .*resnet18"),
        ("timm:resnet9000", "timm has no network 'resnet9000'"),
    ],
)
def test_names_that_a_library_does_not_have_are_refused(arch: str, sentence: str) -> None:
    if arch.startswith("timm"):
        pytest.importorskip("timm")
    with pytest.raises(UserError, match=sentence):
        build(arch, 7)


class HuggingFace:
    """Folders as `save_pretrained` writes them, of a small ViT.

    Attributes:
        config: Folder with a config.json only.
        weights: Folder with weights for five classes and 32x32 images.
    """

    def __init__(self, folder: Path) -> None:
        self.transformers = pytest.importorskip("transformers")
        sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 32, "patch_size": 8}
        layers = {"num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32}
        self.settings = self.transformers.ViTConfig(**sizes, **layers, num_labels=5)
        self.config, self.weights = folder / "config", folder / "weights"
        self.settings.save_pretrained(self.config)
        self.model = self.transformers.ViTForImageClassification(self.settings)
        self.model.save_pretrained(self.weights)

    def build(self, where: Path, **options: Any) -> nn.Module:
        return build(f"hf:{where}", 7, **{"image_size": 32, **options})


@pytest.fixture
def hf(tmp_path: Path) -> HuggingFace:
    return HuggingFace(tmp_path)


def test_a_network_of_hugging_face_is_made_by_its_config(hf: HuggingFace) -> None:
    torch.manual_seed(1)
    model = hf.build(hf.config, image_size=64)
    torch.manual_seed(2)
    other = hf.build(hf.config, image_size=64)
    x = torch.randn(2, 3, 64, 64)
    assert model(x).shape == (2, 7)
    assert not torch.equal(model(x), other(x)), "it is initialised, and not loaded"
    assert all(one.dtype == torch.float32 for one in model.parameters())
    assert [unit.name for unit in units_of(model, x)] == [
        "model.vit.embeddings",
        "model.vit.layers.0",
        "model.vit.layers.1",
        "model.classifier",
    ]


@pytest.mark.parametrize("by_default", [False, True])
def test_weights_of_hugging_face_bring_their_bits_and_classes(
    hf: HuggingFace, by_default: bool
) -> None:
    place = {"weights": "DEFAULT"} if by_default else {"weights": str(hf.weights)}
    model = hf.build(hf.weights if by_default else hf.config, **place)
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(model.eval()(x), hf.model.eval()(x).logits)
    assert model.train().training


def test_weights_that_were_trained_without_labels_get_a_new_head(
    hf: HuggingFace, tmp_path: Path
) -> None:
    body = hf.transformers.ViTModel(hf.settings)
    body.save_pretrained(tmp_path / "body")
    model = hf.build(hf.config, weights=str(tmp_path / "body"))
    found = dict(model.named_parameters())
    for name, value in body.embeddings.named_parameters():
        assert torch.equal(found[f"model.vit.embeddings.{name}"], value)
    assert model(torch.zeros(1, 3, 32, 32)).shape[0] == 1


def test_statistics_of_hugging_face_stand_beside_the_weights(hf: HuggingFace) -> None:
    assert weights_statistics("hf", str(hf.weights), "DEFAULT") is None
    saved = {"do_normalize": True, "image_mean": [0.5, 0.4, 0.3], "image_std": [0.25] * 3}
    (hf.weights / "preprocessor_config.json").write_text(json.dumps(saved))
    expected = ((0.5, 0.4, 0.3), (0.25, 0.25, 0.25))
    assert weights_statistics("hf", str(hf.weights), "DEFAULT") == expected
    assert weights_statistics("hf", str(hf.config), str(hf.weights)) == expected
    assert weights_statistics("torchvision", "resnet18", "DEFAULT") == IMAGENET


def test_what_is_no_image_classifier_of_hugging_face_is_refused(
    hf: HuggingFace, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"there is no folder .*nowhere: give one, or a name"):
        hf.build(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"cannot load .*: give a folder with a config\.json"):
        hf.build(tmp_path / "empty")
    hf.transformers.BertConfig().save_pretrained(tmp_path / "bert")
    with pytest.raises(UserError, match=r"cannot load .*BertConfig"):
        hf.build(tmp_path / "bert")
    with pytest.raises(
        UserError, match=r"cannot load weights .*: give a folder with a model\.safet"
    ):
        hf.build(hf.config, weights="DEFAULT")
    with pytest.raises(UserError, match="for images of 32x32: give --image-size 32"):
        hf.build(hf.weights, weights="DEFAULT", image_size=64)


def test_weights_of_another_network_of_hugging_face_are_refused(
    hf: HuggingFace, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    path = hf.weights / "model.safetensors"
    state = load_file(path)
    taken = next(name for name in state if "layer.1" in name or "layers.1" in name)
    save_file({name: value for name, value in state.items() if name != taken}, path)
    with pytest.raises(UserError, match=r"do not fit this network: they have no vit\."):
        hf.build(hf.weights, weights="DEFAULT")


class Told:
    """Tells that it was unpickled."""

    def __reduce__(self) -> Any:
        return (Path("unpickled").touch, ())


def test_no_code_of_a_folder_is_run(
    hf: HuggingFace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (hf.weights / "model.safetensors").unlink()
    torch.save({"vit.embeddings.cls_token": Told()}, hf.weights / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"cannot load weights"):
        hf.build(hf.weights, weights="DEFAULT")
    config = json.loads((hf.config / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.C"}}
    (hf.config / "config.json").write_text(json.dumps(config))
    (hf.config / "own.py").write_text("import pathlib; pathlib.Path('imported').touch()")
    with pytest.raises(UserError, match=r"cannot load"):
        hf.build(hf.config)
    assert not Path("unpickled").exists()
    assert not Path("imported").exists()


def test_a_library_that_is_missing_is_named_with_the_command_that_installs_it(
    hf: HuggingFace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match=r"pip install 'cachefreeze\[hf\]'"):
        hf.build(hf.config)
