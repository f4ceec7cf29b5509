"""What measures stays as it is: numbers taken at different times are compared.

Behaviour is pinned, not files: what the judge finds in frozen pictures, what both rules say of frozen objects, what the
shapes world draws, which prompts are asked. Moving or rewriting a module changes nothing here; changing what it says
does. If a change of measure is meant, every number in the docs has to be taken again; only then put the new hash here.
"""

import hashlib
import json

import numpy as np
import pytest

from data_pipeline.synthesis import shapes_world as world
from evaluation.judge import Judge
from evaluation.prompts import shapes_prompts
from evaluation.scoring import Found, group, score, score_strictly
from evaluation.suites import ShapesSuite
from evaluation.text_prompts import text_prompts

WEIGHTS = "4450752a2b1ff0421873a4770855351fb380e2f0e29419745c3f325700dbb325"
PROMPTS = {
    "validation": "3e41f7da798e9ac1",
    "test-iid": "bd26383e94d2d0a4",
    "test-compositional": "24fe59187b54e5f9",
    "text": "4c0e6a9fdf22a4aa",
}
RULES = "3e48d9eef70a1999"
WORLD = "93a1daef6d75dc22"
PICTURES = "f5a125e0eef7d5f3"
VERDICTS = {
    "strict": "011001000110010001100100011001000110010001100100011001010110010001100100011001000110010001100100",
    "official": "011001110110110001100110111001110110011101100111111001110110011001100111011001110110011101100111",
}


def digest(value):
    text = json.dumps(value, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def test_the_judge_has_the_weights_it_had():
    assert Judge().fingerprint == WEIGHTS, "the hash of the file, which a judge compares when it loads it"


@pytest.mark.parametrize("name", PROMPTS)
def test_the_same_prompts_are_asked(name):
    prompts = text_prompts(None) if name == "text" else shapes_prompts(name)
    assert digest([[p.text, p.stratum, p.metadata] for p in prompts]) == PROMPTS[name]


def test_the_rules_say_of_random_objects_what_they_said():
    rng = np.random.default_rng(0)
    verdicts = []
    for _ in range(3000):
        metadata = world.sample_prompt(rng, world.SPLITS[rng.integers(4)])
        found = []
        for clause in metadata["include"]:
            for _ in range(clause["count"] + int(rng.choice([-1, 0, 0, 0, 0, 1]))):
                x, y, side = *rng.integers(0, 80, 2).tolist(), int(rng.integers(8, 30))
                color = clause.get("color", "red") if rng.random() < 0.9 else "blue"
                box = (float(x), float(y), float(x + side), float(y + side))
                found.append((clause["class"], Found(box, int(rng.integers(50, 100)) / 100, color)))
        objects = group(found, 0.4)
        verdicts.append([score(metadata, objects).correct, score_strictly(metadata, objects).correct])
    assert 300 < sum(v[1] for v in verdicts) < sum(v[0] for v in verdicts) < 2700
    assert digest(verdicts) == RULES


def frozen_pictures():
    """Prompts of every kind with a picture each: true, of another prompt, or with something that was not asked for."""
    rng = np.random.default_rng(1)
    prompts, pictures = shapes_prompts("test-iid")[:96], []
    for i, p in enumerate(prompts):
        size = ((64, 64), (96, 96), (96, 160))[i % 3]
        shown = p.metadata if i % 4 else prompts[i - 1].metadata
        placed = world.layout(shown, rng, size)
        if i % 4 == 3:
            placed = placed[1:] if i % 8 == 3 else [*placed, *world.layout(prompts[i - 1].metadata, rng, size)[:1]]
        background = list(world.BACKGROUNDS.values())[i % 9]
        pictures.append(world.draw(placed, background, size))
        if i % 8 == 6:
            pictures[-1][-14:-2, 2:14] = (120, 60, 160)
    return prompts, pictures


def test_the_world_draws_what_it_drew():
    splits = [[s, {tag: len(found) for tag, found in world.catalogue(s).items()}] for s in world.SPLITS]
    rng = np.random.default_rng(2)
    placed = [world.layout(world.sample_prompt(rng, "train"), rng, (96, 96)) for _ in range(60)]
    shapes = [[p.shape, p.color, p.rgb] for group in placed for p in group]
    places = [[round(v, 6) for v in (p.x, p.y, p.radius, p.rotation)] for group in placed for p in group]
    assert digest([splits, shapes, places]) == WORLD
    # Of pictures, means of 8 x 8 blocks in steps of 8: another version of OpenCV may round a pixel otherwise.
    blocks = [x.reshape(x.shape[0] // 8, 8, -1, 8, 3).mean((1, 3)) for x in frozen_pictures()[1]]
    assert digest([np.floor(b / 8).astype(int).tolist() for b in blocks]) == PICTURES


def test_the_judge_says_of_frozen_pictures_what_it_said():
    prompts, pictures = frozen_pictures()
    rows = ShapesSuite("test-iid").score(pictures, prompts)
    said = {rule: "".join(str(int(v)) for v in rows[rule]) for rule in VERDICTS}
    assert said == VERDICTS
