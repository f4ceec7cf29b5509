"""Perceptual distances from local weights, as a user has them: random ones, saved by the libraries' own classes."""

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import ConvNextConfig, ConvNextForImageClassification, ViTConfig, ViTModel

from training.randomness import Randomness
from vae.autoencoder import PRESETS, VAE
from vae.crops import Source
from vae.objective import Reconstruction
from vae.perceptual import perceptual

WIDTHS = (4, 4, "pool", 6, 6, "pool", 8, 8, 8, "pool", 8, 8, 8, "pool", 8, 8, 8, "pool")
"""VGG16's layers, as torchvision lists them, with narrow channels."""


class PackagedLPIPS(nn.Module):
    """The modules of torchvision's VGG16 and of the lpips package, with their names; the distance written apart."""

    def __init__(self):
        super().__init__()
        layers, channels, ends = [], 3, []
        for width in WIDTHS:
            if width == "pool":
                ends.append(len(layers) - 1)
                layers.append(nn.MaxPool2d(2, 2))
            else:
                layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
                channels = width
        self.features = nn.Sequential(*layers)
        self.ends = ends
        for i, end in enumerate(ends):
            lin = nn.Module()
            lin.model = nn.Sequential(nn.Dropout(), nn.Conv2d(layers[end - 1].out_channels, 1, 1, bias=False))
            lin.model[1].weight.data.abs_()
            setattr(self, f"lin{i}", lin.eval())

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        shift = torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1)
        scale = torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1)
        x, y, total, number = (x - shift) / scale, (y - shift) / scale, 0, 0
        for i, layer in enumerate(self.features):
            x, y = layer(x), layer(y)
            if i in self.ends:
                difference = (F.normalize(x, dim=1, eps=1e-10) - F.normalize(y, dim=1, eps=1e-10)) ** 2
                total = total + getattr(self, f"lin{number}").model(difference).mean((1, 2, 3))
                number += 1
        return total


def pictures() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.rand(2, 3, 40, 48, generator=generator) * 2 - 1 for _ in range(2))


@pytest.fixture
def lpips(tmp_path):
    torch.manual_seed(0)
    theirs, file = PackagedLPIPS(), tmp_path / "lpips.safetensors"
    save_file(theirs.state_dict(), file)
    return theirs, file


@pytest.fixture
def convnext(tmp_path):
    torch.manual_seed(0)
    config = ConvNextConfig(hidden_sizes=[4, 6, 8, 8], depths=[1, 1, 1, 1], num_labels=3)
    theirs = ConvNextForImageClassification(config).eval()
    for param in theirs.parameters():
        param.data += 0.2 * torch.randn_like(param)  # its layers' scales begin near zero
    theirs.save_pretrained(tmp_path / "convnext")
    return theirs, tmp_path / "convnext"


def test_lpips_equals_the_package(lpips):
    theirs, file = lpips
    x, y = pictures()
    ours = perceptual(f"lpips:{file}")
    torch.testing.assert_close(ours(x, y), theirs(x, y).detach(), rtol=1e-5, atol=1e-6)
    assert ours(x, x).abs().max() == 0


def test_convnext_compares_what_transformers_computes(convnext):
    theirs, folder = convnext
    x, y = pictures()
    mean, std = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    with torch.no_grad():
        a, b = (theirs.convnext(((p + 1) / 2 - mean) / std, output_hidden_states=True).hidden_states for p in (x, y))
        assert len(a) == 5
        expected = sum(
            (F.normalize(p, dim=1, eps=1e-10) - F.normalize(q, dim=1, eps=1e-10)).square().sum(1).mean((1, 2))
            for p, q in zip(a[1:], b[1:], strict=True)
        )
        torch.testing.assert_close(perceptual(f"convnext:{folder}")(x, y), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["lpips", "convnext"])
def test_the_vae_learns_from_them_and_they_do_not_learn(kind, request):
    _, path = request.getfixturevalue(kind)
    distance = perceptual(f"{kind}:{path}")
    assert not any(p.requires_grad for p in distance.parameters())
    vae = VAE(PRESETS["tiny"]).initialize(0)
    frames = torch.randint(0, 256, (1, 3, 48, 48), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    sources = [Source("a", frames, 1), Source("b", frames, 5)]
    norms = {}
    for ratio in (0.0, 0.5):
        objective = Reconstruction(crop=32, least_area=32, perceptual_ratio=ratio, kl_weight=0.0, perceptual=distance)
        crops, _ = objective.prepare(sources, Randomness(0), 1)
        loss, weight, metrics = objective.loss(vae, {}, crops, None)
        assert weight == 2 and metrics["perceptual"] > 0
        (norms[ratio],) = torch.autograd.grad(loss, [vae.decoder.conv_out.weight])
    assert norms[0.5].isfinite().all() and (norms[0.5] - norms[0.0]).abs().max() > 1e-3 * norms[0.0].abs().max()


def test_missing_damaged_and_foreign_weights_are_named(lpips, convnext, tmp_path):
    theirs, file = lpips
    _, folder = convnext
    for kind in ("lpips", "convnext"):
        with pytest.raises(ValueError, match=f"nowhere does not exist; {kind} takes its weights from there"):
            perceptual(f"{kind}:{tmp_path}/nowhere")
    with pytest.raises(ValueError, match="is no safetensors file"):
        perceptual(f"lpips:{folder}")
    some = {n: w for n, w in theirs.state_dict().items() if not n.startswith("lin3")}
    save_file(some, tmp_path / "some.safetensors")
    with pytest.raises(ValueError, match=r"lacks 1 weights .* lin3.model.1.weight"):
        perceptual(f"lpips:{tmp_path}/some.safetensors")
    file.write_bytes(file.read_bytes()[:-50])
    with pytest.raises(ValueError, match="or damaged"):
        perceptual(f"lpips:{file}")
    with pytest.raises(ValueError, match="holds no ConvNeXt"):
        perceptual(f"convnext:{tmp_path}")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-50])
    with pytest.raises(ValueError, match="holds no ConvNeXt"):
        perceptual(f"convnext:{folder}")
    small = ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, image_size=32)
    ViTModel(small).save_pretrained(tmp_path / "vit")
    with pytest.raises(ValueError, match="vit (lacks weights of|holds no) a? ?ConvNeXt"):
        perceptual(f"convnext:{tmp_path}/vit")
