"""The transformers of Stable Diffusion 3 and FLUX.1 against diffusers', and their two layouts."""

import pytest
import torch

from trilemma.errors import UserError
from trilemma.networks.flux import Flux, turned, turns
from trilemma.networks.layers import Embedded
from trilemma.networks.mmdit import MMDiT
from trilemma.stable import flux, places, sd3

SD3 = {
    "channels": 4,
    "width": 32,
    "depth": 3,
    "heads": 2,
    "text_dim": 20,
    "pooled_dim": 12,
    "table": 6,
    "size": 8,
}
SD35 = SD3 | {"qk_norm": True, "twice": (0, 1)}
FLUX = {
    "channels": 4,
    "width": 64,
    "depth": 2,
    "singles": 2,
    "heads": 2,
    "text_dim": 20,
    "pooled_dim": 12,
    "axes": (4, 14, 14),
}
FULL_SD3 = {"patch": 2, "qk_norm": False, "twice": ()}
FULL_FLUX = {"patch": 2, "guided": True}

SD3S = pytest.mark.parametrize("config", [SD3, SD35], ids=["3", "3.5"])
GUIDED = pytest.mark.parametrize("guided", [True, False], ids=["dev", "schnell"])


def lively(network):
    """The same network with every parameter drawn anew: none is 0 or 1."""
    generator = torch.Generator().manual_seed(0)
    for name, value in network.named_parameters():
        around = 1.0 if "norm" in name and "linear" not in name else 0.0
        with torch.no_grad():
            value.normal_(around, 0.2, generator=generator)
    return network.eval()


def inputs(config, count=2, height=8, width=6, words=5):
    torch.manual_seed(1)
    text = Embedded(
        vector=torch.randn(count, config["pooled_dim"]),
        tokens=torch.randn(count, words, config["text_dim"]),
    )
    x = torch.randn(count, config["channels"], height, width)
    return x, torch.linspace(0.2, 0.9, count), text


def assert_close(ours, theirs):
    assert theirs.abs().max() > 0.1
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def load(network, where, state):
    """Load weights from another layout, every tensor of which must be one of ours."""
    taken = {name: place.take(state[place.name]) for name, place in where.items()}
    network.load_state_dict(taken)
    assert {place.name for place in where.values()} == set(state)
    return network.eval()


def their_sd3(config):
    diffusers = pytest.importorskip("diffusers")
    told = sd3.to_config(FULL_SD3 | config)
    del told["_class_name"]
    model = lively(diffusers.SD3Transformer2DModel(**told))
    assert sd3.from_config(model.config, "config.json") == FULL_SD3 | config
    return model


def their_flux(guided):
    diffusers = pytest.importorskip("diffusers")
    config = FULL_FLUX | FLUX | {"guided": guided}
    told = flux.to_config(config)
    del told["_class_name"]
    model = lively(diffusers.FluxTransformer2DModel(**told))
    assert flux.from_config(model.config, "config.json") == config
    return model


@SD3S
@torch.no_grad()
def test_sd3_answers_as_diffusers_does(config):
    theirs = their_sd3(config)
    ours = MMDiT(**config)
    torch.testing.assert_close(ours.positions, theirs.pos_embed.pos_embed, atol=1e-6, rtol=1e-6)
    rules = sd3.diffusers_rules(config)
    load(ours, places.find(ours.state_dict(), rules), theirs.state_dict())
    x, time, text = inputs(config)
    expected = theirs(x, text.tokens, text.vector, 1000 * time).sample
    assert_close(ours(x, time, text), expected)


@GUIDED
@torch.no_grad()
def test_flux_answers_as_diffusers_does(guided):
    theirs = their_flux(guided)
    ours = Flux(**FLUX, guided=guided)
    load(ours, places.find(ours.state_dict(), flux.diffusers_rules()), theirs.state_dict())
    x, time, text = inputs(FLUX)
    guidance = torch.tensor([3.5, 2.0]) if guided else None
    diffusers = pytest.importorskip("diffusers")
    pack, unpack = diffusers.FluxPipeline._pack_latents, diffusers.FluxPipeline._unpack_latents
    expected = theirs(
        pack(x, 2, 4, 8, 6),
        text.tokens,
        text.vector,
        time,
        diffusers.FluxPipeline._prepare_latent_image_ids(2, 4, 3, "cpu", torch.float32),
        torch.zeros(5, 3),
        guidance,
    ).sample
    assert_close(ours(x, time, text, guidance), unpack(expected, 8, 6, 1))


@SD3S
def test_sd3_original_layout_is_the_one_diffusers_converts(config):
    pytest.importorskip("diffusers")
    from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers

    theirs = their_sd3(config).state_dict()
    ours = MMDiT(**config)
    own = load(ours, places.find(ours.state_dict(), sd3.diffusers_rules(config)), theirs)
    where = places.find(own.state_dict(), sd3.original_rules())
    original = places.gather(own.state_dict(), where)
    converted = convert_sd3_transformer_checkpoint_to_diffusers(dict(original))
    assert converted.keys() == theirs.keys()
    assert all(torch.equal(converted[name], theirs[name]) for name in theirs)
    assert original["joint_blocks.0.x_block.attn.qkv.weight"].shape == (96, 32)

    shapes = {name: value.shape for name, value in original.items()}
    told = sd3.from_shapes(shapes, heads=None if config is SD35 else 2)
    assert told == FULL_SD3 | config | {"size": 128}
    again = load(MMDiT(**told), where, original).state_dict()
    assert all(torch.equal(again[name], value) for name, value in own.state_dict().items())


@GUIDED
def test_flux_original_layout(guided):
    """Every tensor of the original network, by name and shape, and the same weights from it."""
    own = lively(Flux(**FLUX, guided=guided))
    where = places.find(own.state_dict(), flux.original_rules())
    original = places.gather(own.state_dict(), where)
    shapes = {name: tuple(value.shape) for name, value in original.items()}
    assert shapes == original_flux_shapes(guided)
    assert flux.from_shapes(shapes) == FULL_FLUX | FLUX | {"guided": guided}
    again = load(Flux(**FLUX, guided=guided), where, original).state_dict()
    assert all(torch.equal(again[name], value) for name, value in own.state_dict().items())
    rows = own.state_dict()["singles.1.attention.k.weight"]
    assert torch.equal(original["single_blocks.1.linear1.weight"][64:128], rows)
    rows = own.state_dict()["singles.1.up.bias"]
    assert torch.equal(original["single_blocks.1.linear1.bias"][192:], rows)


def original_flux_shapes(guided, width=64, text=20, pooled=12, channels=16, head=32):
    """The names that Black Forest Labs gave the tensors of FLUX.1, at the sizes of `FLUX`."""
    layers = {"img_in": (width, channels), "txt_in": (width, text)}
    for name, features in (("time_in", 256), ("vector_in", pooled), ("guidance_in", 256)):
        if guided or name != "guidance_in":
            layers |= {f"{name}.in_layer": (width, features), f"{name}.out_layer": (width, width)}
    norms = []
    for i in range(2):
        for stream in ("img", "txt"):
            at = f"double_blocks.{i}.{stream}"
            layers |= {
                f"{at}_mod.lin": (6 * width, width),
                f"{at}_attn.qkv": (3 * width, width),
                f"{at}_attn.proj": (width, width),
                f"{at}_mlp.0": (4 * width, width),
                f"{at}_mlp.2": (width, 4 * width),
            }
            norms.append(f"{at}_attn.norm")
        at = f"single_blocks.{i}"
        layers |= {
            f"{at}.modulation.lin": (3 * width, width),
            f"{at}.linear1": (7 * width, width),
            f"{at}.linear2": (width, 5 * width),
        }
        norms.append(f"{at}.norm")
    layers |= {
        "final_layer.linear": (channels, width),
        "final_layer.adaLN_modulation.1": (2 * width, width),
    }
    shapes = {f"{name}.weight": shape for name, shape in layers.items()}
    shapes |= {f"{name}.bias": shape[:1] for name, shape in layers.items()}
    shapes |= {f"{norm}.{each}_norm.scale": (head,) for norm in norms for each in ("query", "key")}
    return shapes


def test_weights_are_views_of_the_file():
    own = Flux(**FLUX)
    where = places.find(own.state_dict(), flux.original_rules())
    original = places.gather(own.state_dict(), where)
    for name, place in where.items():
        file = original[place.name].untyped_storage()
        taken = place.take(original[place.name])
        assert taken.is_contiguous(), name
        assert (taken.untyped_storage().data_ptr() == file.data_ptr()) != place.swapped
    assert not any(place.swapped for place in where.values())


def test_a_weight_without_a_rule_is_named():
    with pytest.raises(KeyError, match="novel"):
        places.find(["enter.weight", "novel.weight"], flux.original_rules())


@pytest.mark.parametrize("make", [lambda: MMDiT(**SD35), lambda: Flux(**FLUX)], ids=["3.5", "flux"])
def test_every_parameter_learns_and_the_text_is_heard(make):
    network = lively(make())
    x, time, text = inputs(SD3)
    guidance = (torch.full((2,), 3.0),) if isinstance(network, Flux) else ()
    text.vector.requires_grad_(), text.tokens.requires_grad_()
    out = network(x, time, text, *guidance)
    assert out.shape == x.shape
    out.square().mean().backward()
    silent = [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()]
    unread = "blocks.2.text.attention"  # nothing reads what the words ask of the last block
    assert set(silent) <= {f"{unread}.{q}" for q in ("q.weight", "q.bias", "norm_q.weight")}
    assert text.vector.grad.abs().min() > 0
    assert text.tokens.grad.abs().min() > 0


@torch.no_grad()
def test_positions_are_cut_from_the_middle_of_the_table():
    network = MMDiT(**SD3)
    rows = network.positions.view(6, 6, -1)
    assert torch.equal(network._positions(2, 4).view(2, 4, -1), rows[2:4, 1:5])
    with pytest.raises(ValueError, match="7x2 patches are more .* 6x6"):
        network._positions(7, 2)


def test_products_of_turned_pairs_depend_on_the_distance_alone():
    q, k = torch.randn(2, 1, 1, 1, 32)
    place = torch.tensor([[0, 0, 0], [0, 2, 5], [0, 5, 6], [0, 4, 1], [0, 7, 2]])
    start, here, there, on, off = turns(place, FLUX["axes"]).split(1, dim=1)
    assert torch.equal(turned(q, start), q)
    products = [(turned(q, a) * turned(k, b)).sum() for a, b in ((here, there), (on, off))]
    torch.testing.assert_close(*products)
    assert (products[0] - (turned(q, here) * turned(k, on)).sum()).abs() > 1e-3


def test_what_does_not_fit_is_refused():
    x, time, text = inputs(SD3)
    with pytest.raises(ValueError, match="multiples of 2"):
        MMDiT(**SD3)(x[:, :, :7], time, text)
    with pytest.raises(ValueError, match="give embedded.vector and embedded.tokens"):
        MMDiT(**SD3)(x, time, Embedded(tokens=text.tokens))
    with pytest.raises(ValueError, match=r"expected \(B, 12\)"):
        MMDiT(**SD3)(x, time, Embedded(text.vector[:, 1:], text.tokens))
    with pytest.raises(ValueError, match="told none"):
        Flux(**FLUX, guided=False)(x, time, text, time)
    with pytest.raises(ValueError, match="told a guidance"):
        Flux(**FLUX)(x, time, text)
    with pytest.raises(ValueError, match="64 / 2 dimensions"):
        Flux(**FLUX | {"axes": (4, 4, 4)})


def test_configurations_of_other_networks_are_refused():
    told = sd3.to_config(FULL_SD3 | SD3)
    with pytest.raises(UserError, match="qk_norm 'layer_norm'; .* None or 'rms_norm'"):
        sd3.from_config(told | {"qk_norm": "layer_norm"}, "a/config.json")
    told = flux.to_config(FULL_FLUX | FLUX)
    with pytest.raises(UserError, match="a/config.json has out_channels 16; .* not Fill"):
        flux.from_config(told | {"in_channels": 96, "out_channels": 16}, "a/config.json")
    shapes = original_flux_shapes(True)
    with pytest.raises(UserError, match="takes 96 channels and final_layer gives 16"):
        flux.from_shapes(shapes | {"img_in.weight": (64, 96)})
