"""What guides a denoiser: each kind against its formula, on a mixture with known scores."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image

import exact
import tiny
from trilemma import cli, drawing, guides, recipe, sampling, training
from trilemma.batch import Condition, Rng
from trilemma.codecs import Pixels
from trilemma.diffusion import schedules
from trilemma.diffusion.guidance import Guidance, by_classifier, elsewhere, fit_of, level
from trilemma.errors import UserError
from trilemma.models.diffusion import Diffusion

N = 12
LABEL = torch.arange(N) % 3
GIVEN = Condition(N, LABEL)
NOTHING = Condition(N)
TIMES = (0.1, 0.4, 0.8)


def noisy(t, schedule=None):
    alpha, sigma = level(schedule or schedules.Straight(), t)
    rng = Rng(range(N))
    x0 = exact.MEANS[LABEL] + exact.STD * rng.normal(2)
    return (alpha * x0 + sigma * rng.normal(2)).view(N, *exact.SHAPE)


@pytest.mark.parametrize("schedule", [schedules.Straight(), schedules.Linear()])
@pytest.mark.parametrize("theirs", [schedules.Straight(), schedules.Cosine()])
def test_a_classifier_makes_an_unconditional_model_conditional(schedule, theirs):
    model, judge = exact.model(schedule), exact.classifier(theirs)
    guided = model.denoiser(NOTHING, Guidance())
    for t in TIMES:
        x = noisy(t, schedule)
        wanted = model.denoiser(GIVEN)(x, t)
        log_prob = judge.log_prob_of(GIVEN, exact.SHAPE, schedule)
        made = by_classifier(guided, log_prob, 1.0, model.schedule)(x, t)
        torch.testing.assert_close(made, wanted, atol=2e-4, rtol=0)


def test_classifier_guidance_draws_from_the_class():
    model, judge = exact.model(), exact.classifier(schedules.Linear())
    model.conditioner.forward = model.conditioner.nothing  # as one that knows no classes
    label = torch.full((400,), 1)
    with torch.no_grad():
        drawn = model.sample(
            Condition(400, label), Rng(range(400)), guidance=Guidance(classifier=judge), steps=30
        ).flatten(1)
    torch.testing.assert_close(drawn.mean(0), exact.MEANS[1], atol=0.03, rtol=0)
    torch.testing.assert_close(drawn.std(0), torch.full((2,), exact.STD), atol=0.02, rtol=0)


def test_classifier_free_guidance_goes_along_a_line():
    model = exact.model()
    for t in TIMES:
        x = noisy(t)
        given, without = model.denoiser(GIVEN)(x, t), model.denoiser(NOTHING)(x, t)
        guided = model.denoiser(GIVEN, 2.5)(x, t)
        torch.testing.assert_close(guided, (without + 2.5 * (given - without)).clamp(-1, 1))


def test_guidance_acts_within_its_interval_alone():
    model = exact.model()
    guided = model.denoiser(GIVEN, Guidance(2.5, interval=(0.5, 2.0)))
    always, never = model.denoiser(GIVEN, 2.5), model.denoiser(GIVEN)
    for t, acts in ((0.2, False), (1 / 3, False), (0.4, True), (2 / 3, True), (0.8, False)):
        x = noisy(t)  # sigma / alpha is t / (1 - t)
        assert torch.equal(guided(x, t), (always if acts else never)(x, t)), t


def test_rescaling_brings_the_spread_back():
    model = exact.model()
    x, t = noisy(0.5), 0.5
    given, guided = model.denoiser(GIVEN)(x, t), model.denoiser(GIVEN, Guidance(2.0))(x, t)
    whole = model.denoiser(GIVEN, Guidance(2.0, rescale=1.0))(x, t)
    half = model.denoiser(GIVEN, Guidance(2.0, rescale=0.5))(x, t)
    deviation = given.flatten(1).std(1)
    torch.testing.assert_close(whole.flatten(1).std(1), deviation)
    torch.testing.assert_close(half, (guided + whole) / 2)
    assert not torch.allclose(guided.flatten(1).std(1), deviation)


@pytest.mark.parametrize("theirs", [schedules.Straight(), schedules.Linear()])
def test_auto_guidance_goes_away_from_the_weaker_model(theirs):
    model, weaker = exact.model(), exact.model(theirs, std=0.3)
    for t in TIMES:
        x = noisy(t)
        strong, weak = model.denoiser(GIVEN)(x, t), exact.model(std=0.3).denoiser(GIVEN)(x, t)
        guided = model.denoiser(GIVEN, Guidance(1.7, weaker=weaker))(x, t)
        torch.testing.assert_close(guided, weak + 1.7 * (strong - weak), atol=1e-4, rtol=1e-4)


def test_a_guide_moves_along_the_covariance_of_what_is_behind():
    """Of one Gaussian: x_0 moves by scale s^2 sigma^2 / (alpha^2 s^2 + sigma^2) times dg/dx_0."""
    model, wanted = exact.model(), torch.tensor([1.0, -2.0])
    guidance = Guidance(guide=lambda image: (image.flatten(1) * wanted).sum(1), guide_scale=3.0)
    for t in TIMES:
        x = noisy(t)
        alpha, sigma = 1 - t, t
        spread = exact.STD**2 * sigma**2 / (alpha**2 * exact.STD**2 + sigma**2)
        moved = model.denoiser(GIVEN, guidance)(x, t) - model.denoiser(GIVEN)(x, t)
        expected = (3 * spread * wanted).view(exact.SHAPE).expand_as(moved)
        torch.testing.assert_close(moved, expected, atol=1e-5, rtol=1e-3)


def test_a_guide_tilts_the_distribution():
    """A Gaussian times exp(c x) has its mean moved by s^2 c, and the same deviation."""
    model, wanted = exact.model(), torch.tensor([4.0, -6.0])
    guide = Guidance(guide=lambda image: (image.flatten(1) * wanted).sum(1))
    condition = Condition(600, torch.full((600,), 2))
    with torch.no_grad():
        drawn = model.sample(condition, Rng(range(600)), guidance=guide, steps=30).flatten(1)
    expected = exact.MEANS[2] + exact.STD**2 * wanted
    torch.testing.assert_close(drawn.mean(0), expected, atol=0.025, rtol=0)
    torch.testing.assert_close(drawn.std(0), torch.full((2,), exact.STD), atol=0.02, rtol=0)


def test_all_guide_at_once():
    """A classifier and a function add up; the function's gradient is at the model's own x_0."""
    model, judge = exact.model(), exact.classifier(schedules.Linear())
    guide = Guidance(2.0, guide=lambda image: image.flatten(1).sum(1), guide_scale=0.5)
    both = Guidance(2.0, classifier=judge, classifier_scale=0.1, guide=guide.guide, guide_scale=0.5)
    x, t = noisy(0.5), 0.5
    plain, one = model.denoiser(GIVEN, 2.0)(x, t), model.denoiser(GIVEN, guide)(x, t)
    other = model.denoiser(GIVEN, Guidance(2.0, classifier=judge, classifier_scale=0.1))(x, t)
    all_ = model.denoiser(GIVEN, both)(x, t)
    torch.testing.assert_close(all_ - plain, (one - plain) + (other - plain), atol=1e-5, rtol=1e-4)


def test_what_is_out_of_bounds_can_be_led_back():
    class Bright(torch.nn.Module):
        def forward(self, x, time, embedded):
            return 1 + x.abs()  # all brighter than white

    model = Diffusion(Pixels(exact.SHAPE), Bright(), None, schedules.Straight(), target="image")
    x = noisy(0.5).abs()
    dark = model.denoiser(NOTHING, Guidance(guide=guides.dark, guide_scale=50.0))(x, 0.5)
    assert (dark < 0.5).all()


def test_a_schedule_in_terms_of_another():
    straight, linear = schedules.Straight(), schedules.Linear()
    x0, noise = torch.randn(5, 3), torch.randn(5, 3)
    for t in (0.05, 0.5, 0.95):
        (alpha, sigma), there = level(straight, t), None
        x, there = elsewhere(alpha * x0 + sigma * noise, t, straight, linear)
        alpha, sigma = level(linear, there)
        torch.testing.assert_close(x, alpha * x0 + sigma * noise, atol=1e-5, rtol=1e-5)
    x, there = elsewhere(noise, 1.0, straight, linear)
    assert there == 1 and torch.allclose(x, noise)


def test_a_guide_of_one_number_is_asked_picture_by_picture():
    images = torch.rand(5, 1, 4, 4) * 2 - 1
    one = fit_of(lambda image: image.mean(), images)
    torch.testing.assert_close(one, images.flatten(1).mean(1))
    assert fit_of(lambda image: image.mean(), images[:1]).shape == (1,)
    model = exact.model()
    guidance = Guidance(guide=lambda image: image.square().mean(), guide_scale=9.0)
    x = noisy(0.5)
    whole = model.denoiser(GIVEN, guidance)(x, 0.5)
    alone = model.denoiser(GIVEN[3:4], guidance)(x[3:4], 0.5)
    torch.testing.assert_close(whole[3:4], alone)


@pytest.mark.parametrize(
    "guide,message",
    [
        (lambda image: image, r"a tensor \(12, 1, 1, 2\).*one number for each"),
        (lambda image: 3.0, "returned 3.0"),
        (lambda image: image.detach().flatten(1).sum(1), "no gradient"),
        (lambda image: image.round().flatten(1).sum(1) * torch.inf, "not finite"),
        (lambda image: (image * 0).sqrt().flatten(1).sum(1), "not finite.*square"),
        (lambda image: torch.ones(12, requires_grad=True), "no gradient"),
        (lambda: 0, r"raised TypeError: .* takes 0 positional"),
        (lambda image: {}["it"], r"raised KeyError: 'it' \(.*test_guidance.py, line \d+\)"),
        (lambda image: image @ torch.ones(7, 7), "raised RuntimeError: .*called with pictures"),
    ],
)
def test_bad_guides_are_explained(guide, message):
    with pytest.raises(ValueError, match=message):
        exact.model().denoiser(GIVEN, Guidance(guide=guide))(noisy(0.5), 0.5)


def test_what_cannot_guide_is_explained():
    with pytest.raises(ValueError, match="two numbers"):
        Guidance(2.0, interval=(3.0, 0.2))
    with pytest.raises(ValueError, match="0 to 1"):
        Guidance(2.0, rescale=2.0)
    with pytest.raises(ValueError, match="guidance 2"):
        Guidance(weaker=exact.model())
    for wrong in ({"scale": torch.nan}, {"clip_scale": torch.inf}, {"guide_scale": "much"}):
        with pytest.raises(ValueError, match="expected a finite number"):
            Guidance(**wrong)
    with pytest.raises(ValueError, match="crops is 0"):
        Guidance(crops=0)
    model, judge = exact.model(), exact.classifier(schedules.Linear())
    with pytest.raises(ValueError, match="labels of 0 to 2; got none"):
        model.denoiser(NOTHING, Guidance(classifier=judge))
    judge.codec = Pixels((1, 4, 4))
    with pytest.raises(ValueError, match="at this size"):
        model.denoiser(GIVEN, Guidance(classifier=judge))
    other = exact.model()
    other.codec = Pixels((1, 4, 4))
    with pytest.raises(ValueError, match="the same pictures"):
        model.denoiser(GIVEN, Guidance(2.0, weaker=other))
    with torch.inference_mode(), pytest.raises(ValueError, match="no_grad"):
        model.denoiser(GIVEN, Guidance(guide=guides.bright))(noisy(0.5), 0.5)


def test_ready_guides_prefer_what_they_say():
    image = torch.zeros(2, 3, 4, 4)
    image[0, 0], image[0, 1:] = 1.0, -1.0  # red
    image[1, :, :, 0] = 1.0  # bright on the left
    assert guides.red(image)[0] == 0 > guides.red(image)[1] > guides.blue(image)[0]
    assert guides.symmetry(image)[0] == 0 > guides.symmetry(image)[1]
    assert guides.bright(image)[1] > guides.bright(image)[0] == -16 == -guides.dark(image)[0]
    with pytest.raises(UserError, match="bright or dark"):
        guides.green(image[:, :1])


def test_guides_are_found_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_guide.py").write_text("def darker(image):\n    return -image.mean()\n")
    function = guides.find("my_guide:darker")
    assert function(torch.ones(())) == -1 and guides.name_of(function) == "my_guide:darker"
    for name, message in {
        "my_guide": "expected module:function",
        "no_such_module:x": "cannot be imported",
        "my_guide:brighter": "no function 'brighter'; it has darker",
    }.items():
        with pytest.raises(UserError, match=message):
            guides.find(name)
    for name, content in {"unclosed": "def f(x:", "failing": "1 / 0", "leaving": "exit(3)"}.items():
        (tmp_path / f"{name}.py").write_text(content)
        with pytest.raises(UserError, match=r"cannot be imported \((Syntax|ZeroDiv|SystemE)"):
            guides.find(f"{name}:f")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tiny.pictures(tmp_path_factory.mktemp("pictures"))
    out = tmp_path_factory.mktemp("runs") / "quick-diffusion"
    changes = tiny.overrides("quick-diffusion")
    training.train("quick-diffusion", folder, out=out, steps=4, overrides=changes, quiet=True)
    return out


def test_from_the_command_line(run, tmp_path, monkeypatch, capsys):
    def call(*arguments):
        words = ["sample", run, "-n", 2, "--steps", 2, "--json", "--out", tmp_path / "out"]
        monkeypatch.setattr("sys.argv", ["trilemma", *map(str, [*words, *arguments])])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        told = capsys.readouterr()
        if stop.value.code:
            return told.err
        path = json.loads(told.out)["images"][1]
        return json.loads(Image.open(path).text["trilemma"])["sample"]

    guided = ["--guide", "trilemma.guides:red", "--guide-scale", 5]
    told = call(*guided, "--guidance", 2, "--guidance-interval", "0.2,3")
    assert told["guide"] == "trilemma.guides:red" and told["guide_scale"] == 5
    assert told["guidance_interval"] == [0.2, 3]
    told = call("--guide-with", run, "--guidance", 2, "--guidance-rescale", 0.7)
    assert told["guide_with"] == str(run) and told["guidance_rescale"] == 0.7
    assert "expected two numbers" in call("--guidance-interval", "3,0.2")
    assert "expected module:function" in call("--guide", "red")


def test_a_guide_from_python_is_seen_and_written_down(run, tmp_path):
    trained = sampling.load(run)
    options = {"steps": 3, "guide": guides.red, "guide_scale": 20.0}
    guided, plain = trained.sample(4, **options), trained.sample(4, steps=3)
    assert guided[:, 0].float().mean() > plain[:, 0].float().mean() + 5
    assert guided[:, 2].float().mean() < plain[:, 2].float().mean() - 5
    alone = trained.sample(1, seed=2, **options).int()
    assert (alone - guided[2:3].int()).abs().max() <= 2, "a picture depends on its batch"
    *_, sheet = drawing.save(trained, 1, tmp_path / "out", **options)
    assert json.loads(Image.open(sheet).text["trilemma"])["sample"]["guide"].endswith(":red")
    assert trained.options({"guide_with": trained})["guide_with"] == str(run)


def test_options_that_would_say_nothing_and_what_is_no_number_are_refused(run):
    trained = sampling.load(run)
    for wrong, told in (
        ({"guide_scale": 3.0}, "guide_scale says something of guide, and there is none"),
        ({"classifier_scale": 3.0}, "give classifier too"),
        ({"guidance_interval": [0.2, 3], "guidance": 1.0}, "give guidance too, above 1"),
        ({"guidance_rescale": 0.5, "guidance": 1.0}, "give guidance too, above 1"),
        ({"steps": 2.5}, "steps is 2.5; expected a whole number, such as 20"),
        ({"guidance": "much"}, "guidance is 'much'; expected a number"),
    ):
        with pytest.raises(UserError, match=told):
            trained.options(wrong)
    assert trained.options({"guidance": 2.0, "guidance_interval": [0.2, 3]})["guidance"] == 2


def test_a_checkpoint_names_no_functions(run):
    trained = sampling.load(run)
    trained.recipe["sample"] |= {"guide": "os:system", "classifier": "x", "guidance_rescale": 0.5}
    chosen = trained.options({})
    assert "guide" not in chosen and "classifier" not in chosen
    assert chosen["guidance_rescale"] == 0.5


def test_other_families_and_other_pictures_do_not_guide(run, tmp_path):
    trained = sampling.load(run)
    folder = tiny.pictures(tmp_path / "pictures")
    changes = tiny.overrides("quick-vae")
    out = tmp_path / "vae"
    vae = training.train("quick-vae", folder, out=out, steps=1, overrides=changes, quiet=True)
    with pytest.raises(UserError, match="which cannot guide"):
        trained.sample(1, guide_with=out, guidance=2.0)
    with pytest.raises(UserError, match="tells no classes"):
        trained.sample(1, classifier=run)
    with pytest.raises(UserError, match="no option|cannot be sampled with 'guide'"):
        vae.sample(1, guide=guides.red)


def test_facts_add_up():
    facts = {"channels": 3, "size": 8}
    made = recipe.resolve({"model": {"a": "@channels + 1", "b": "@channels+@size"}}, facts)
    assert made["model"] == {"a": 4, "b": 11}
    with pytest.raises(UserError, match="asks for @colours"):
        recipe.resolve({"a": "@channels + @colours"}, facts)
