"""Our VAE against diffusers' two classes with the same random weights: values, gradients, folders."""

import json

import pytest
import torch
from diffusers import AutoencoderKLQwenImage, AutoencoderKLWan

from vae.autoencoder import PRESETS, VAE

DIFFUSERS = {"qwen-image": AutoencoderKLQwenImage, "wan": AutoencoderKLWan}


def random_vae(preset: str) -> VAE:
    """A VAE none of whose weights is zero or one."""
    torch.manual_seed(0)
    vae = VAE(PRESETS[preset])
    for name, param in vae.named_parameters():
        if name.endswith("gamma"):
            param.data.add_(0.2 * torch.randn_like(param))
    return vae


def twin(vae: VAE, kind: str = "qwen-image"):
    """diffusers' class with the weights of `vae`, loaded strictly."""
    config = vae.config
    other = DIFFUSERS[kind](
        base_dim=config.base_dim,
        num_res_blocks=config.num_res_blocks,
        latents_mean=list(config.latents_mean),
        latents_std=list(config.latents_std),
    )
    other.load_state_dict(vae.state_dict())
    return other


def pixels(frames: int, height: int = 24, width: int = 16) -> torch.Tensor:
    return torch.rand(1, 3, frames, height, width, generator=torch.Generator().manual_seed(frames)) * 2 - 1


@pytest.mark.parametrize("frames", [1, 5, 9])
@pytest.mark.parametrize("preset,kind", [("tiny", "qwen-image"), ("tiny", "wan"), ("qwen-image", "qwen-image")])
def test_encode_and_decode_equal_diffusers(preset, kind, frames):
    vae = random_vae(preset)
    theirs = twin(vae, kind)
    x = pixels(frames)
    with torch.no_grad():
        mean, logvar = vae.moments(x)
        expected = theirs.encode(x).latent_dist
        torch.testing.assert_close(mean, expected.mean, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(logvar, expected.logvar, rtol=1e-5, atol=1e-5)

        std, shift = (
            torch.tensor(getattr(vae.config, n)).view(1, 16, 1, 1, 1) for n in ("latents_std", "latents_mean")
        )
        torch.testing.assert_close(vae.encode_latent(x), (expected.mode() - shift) / std, rtol=1e-5, atol=1e-5)

        z = torch.randn(mean.shape, generator=torch.Generator().manual_seed(9))
        y = theirs.decode(z).sample
        assert y.shape == x.shape and y.std() > 0.1
        torch.testing.assert_close(vae.reconstruct(z).clamp(-1, 1), y, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(vae.decode_latent((z - shift) / std), y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("frames", [1, 5, 9])
@pytest.mark.parametrize("preset", ["tiny", pytest.param("qwen-image", marks=pytest.mark.slow)])
def test_every_gradient_equals_diffusers(preset, frames):
    vae = random_vae(preset).double()
    theirs = twin(vae).double()
    x = pixels(frames, 16, 16).double()
    inputs = [x.clone().requires_grad_(), x.clone().requires_grad_()]
    weight = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).double()

    mean, logvar = vae.moments(inputs[0])
    (vae.reconstruct(mean * 0.1).clamp(-1, 1) * weight + logvar.mean()).sum().backward()
    posterior = theirs.encode(inputs[1]).latent_dist
    (theirs.decode(posterior.mean * 0.1).sample * weight + posterior.logvar.mean()).sum().backward()

    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=1e-5, atol=1e-5)
    expected = dict(theirs.named_parameters())
    for name, param in vae.named_parameters():
        if expected[name].grad is None:  # convolutions over time, with one frame
            assert frames == 1 and param.grad is None and "time_conv" in name, name
        else:
            scale = expected[name].grad.abs().max()
            torch.testing.assert_close(param.grad / scale, expected[name].grad / scale, rtol=0, atol=1e-5, msg=name)


def test_full_width_has_the_reference_names_and_parameter_counts():
    with torch.device("meta"):
        vae = VAE(PRESETS["qwen-image"])
        theirs = AutoencoderKLQwenImage()
    shapes = {n: w.shape for n, w in vae.state_dict().items()}
    assert len(shapes) == 194 and shapes == {n: w.shape for n, w in theirs.state_dict().items()}
    assert sum(p.numel() for p in vae.encoder.parameters()) == 53_595_872
    assert sum(p.numel() for p in vae.decoder.parameters()) == 73_295_331
    defaults = theirs.config
    assert list(vae.config.latents_mean) == defaults.latents_mean
    assert list(vae.config.latents_std) == defaults.latents_std


def test_two_decoders_export_and_reload_bit_for_bit(tmp_path):
    vae = random_vae("tiny")
    vae.split_decoders()
    for param in vae.decoder.parameters():
        param.data.add_(0.01)
    vae.save(tmp_path)
    image = AutoencoderKLQwenImage.from_pretrained(tmp_path / "vae")
    video = AutoencoderKLWan.from_pretrained(tmp_path / "vae_video")
    back = VAE.from_folder(tmp_path)
    for name, weight in vae.state_dict().items():
        assert torch.equal(back.state_dict()[name], weight), name
        folder, own = (video, name.removeprefix("video_")) if name.startswith("video_") else (image, name)
        assert torch.equal(folder.state_dict()[own], weight), name
    for name in ("encoder.conv_in.weight", "quant_conv.bias"):
        assert torch.equal(image.state_dict()[name], video.state_dict()[name])
    assert back.fingerprint() == vae.fingerprint() == VAE.from_folder(tmp_path / "vae_video").fingerprint()

    z = torch.randn(1, 16, 2, 2, 2)
    with torch.no_grad():
        torch.testing.assert_close(back.decode_latent(z), video.decode(back.denormalise(z)).sample, rtol=0, atol=1e-5)
        one = z[:, :, :1]
        torch.testing.assert_close(
            back.decode_latent(one), image.decode(back.denormalise(one)).sample, rtol=0, atol=1e-5
        )


@pytest.mark.parametrize("kind", DIFFUSERS)
def test_import_keeps_weights_and_statistics(tmp_path, kind):
    mean, std = [0.5 * i for i in range(16)], [1.0 + i for i in range(16)]
    theirs = DIFFUSERS[kind](base_dim=8, num_res_blocks=1, latents_mean=mean, latents_std=std)
    theirs.save_pretrained(tmp_path)
    vae = VAE.from_folder(tmp_path)
    assert list(vae.config.latents_mean) == mean and list(vae.config.latents_std) == std
    assert all(torch.equal(w, theirs.state_dict()[n]) for n, w in vae.state_dict().items())
    x = pixels(1)
    with torch.no_grad():
        expected = theirs.encode(x).latent_dist.mode()
    torch.testing.assert_close(vae.denormalise(vae.encode_latent(x)), expected, rtol=1e-5, atol=1e-5)


def edit_config(folder, **changes):
    record = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(record | changes))


def test_foreign_folders_are_refused(tmp_path):
    VAE(PRESETS["tiny"]).save(tmp_path)
    folder = tmp_path / "vae"

    edit_config(folder, base_dim=16)
    with pytest.raises(ValueError, match=r"decoder.conv_in.bias is \(32,\) in the file and \(64,\) in its config"):
        VAE.from_folder(folder)
    edit_config(folder, base_dim=8, is_residual=True)
    with pytest.raises(ValueError, match="is_residual = True is another architecture"):
        VAE.from_folder(folder)
    edit_config(folder, is_residual=False, decoder_base_dim=16)
    with pytest.raises(ValueError, match="decoder_base_dim = 16"):
        VAE.from_folder(folder)
    edit_config(folder, decoder_base_dim=None, _class_name="AutoencoderKL")
    with pytest.raises(ValueError, match="holds AutoencoderKL, not"):
        VAE.from_folder(folder)
    edit_config(folder, _class_name="AutoencoderKLWan", latents_std=[0.0] * 16)
    with pytest.raises(ValueError, match="stds positive"):
        VAE.from_folder(folder)

    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match="is damaged"):
        VAE.from_folder(folder)


def test_cut_weights_and_strangers_pairs_are_refused(tmp_path):
    vae = random_vae("tiny")
    vae.split_decoders()
    vae.save(tmp_path)
    stranger = VAE(PRESETS["tiny"])
    stranger.save(tmp_path / "other")
    (tmp_path / "other" / "vae").rename(tmp_path / "other" / "vae_video")
    (tmp_path / "vae_video").rename(tmp_path / "kept")
    (tmp_path / "other" / "vae_video").rename(tmp_path / "vae_video")
    with pytest.raises(ValueError, match="another encoder"):
        VAE.from_folder(tmp_path)

    weights = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match="is damaged"):
        VAE.from_folder(tmp_path / "vae")


def test_save_replaces_a_folder_whole(tmp_path):
    first, second = random_vae("tiny"), VAE(PRESETS["tiny"])
    first.save(tmp_path)
    second.save(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["vae"]
    assert VAE.from_folder(tmp_path).fingerprint() == second.fingerprint() != first.fingerprint()
