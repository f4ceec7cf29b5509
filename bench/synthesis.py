"""Synthetic data: samples per second of each kind, pages read back by Tesseract, and glyphs that are missing.

rate       samples made and encoded per second, by all workers together, after they have started
read back  mean normalised edit distance between a page's text and what Tesseract reads, with a bootstrap interval
glyphs     characters of pages that are glyph 0 of their font, by FreeType

By default a glance of about two minutes; docs/data.md has --read-samples 300 --glyph-samples 10000.
"""

import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

try:
    from command_line import run
except ModuleNotFoundError as missing:
    raise SystemExit(f"not installed ({missing}): run `make setup`, or `pip install -e . -c constraints.txt`") from None


READ_SEED = 3
"""Not that of the pages on which reading was tuned (0 to 2)."""


@dataclass(frozen=True)
class Config:
    size: int = 256
    workers: int = os.cpu_count() or 1
    rate_samples: int = 100
    """Samples of each kind that are timed."""
    read_samples: int = 8
    """Pages that are read back in each language (vertical ones apart)."""
    glyph_samples: int = 1000
    """Pages whose glyphs are looked up."""
    out: Path | None = None
    """Also write the rows as JSON."""


def main(config: Config) -> None:
    rows = [*rates(config), *read_back(config), missing_glyphs(config)]
    for row in rows:
        print("  ".join(f"{value}" if isinstance(value, int | str) else f"{value:.4f}" for value in row.values()))
    if config.out:
        config.out.write_text(json.dumps(rows, indent=1))


def rates(config: Config):
    """Samples a second of each kind."""
    from data_pipeline.parallel import map_ordered
    from data_pipeline.synthesis.kinds import KINDS, Recipe, make_job

    for kind in KINDS:
        recipe = Recipe(((kind, 1.0),), config.size, seed=0)
        recipe.load()
        warm = 16 * config.workers
        samples = map_ordered(
            partial(make_job, recipe), ((i, None) for i in range(warm + config.rate_samples)), config.workers
        )
        for _ in range(warm):
            next(samples)
        start = time.perf_counter()
        count = sum(1 for _ in samples)
        seconds = time.perf_counter() - start
        yield {
            "measure": "rate",
            "kind": kind,
            "size": config.size,
            "workers": config.workers,
            "per_s": count / seconds,
        }


def read_back(config: Config):
    """Edit distances by language, vertical Chinese apart; then of the Chinese pages that hold common characters only.

    The control is how the engine reads the same lines in black on white at 32 pixels: what it doesn't know.
    """
    import numpy as np

    from data_pipeline.synthesis.corpus import read_corpus
    from data_pipeline.synthesis.fonts import find_faces
    from data_pipeline.synthesis.picture import generator
    from data_pipeline.synthesis.pure import make
    from data_pipeline.synthesis.read_back import is_common, missing_models, model_for, normalize, read
    from data_pipeline.synthesis.typesetting import Style, set_passage
    from rewards.ocr import edit_distance

    wanted = {case: [] for case in (("english", False), ("chinese", False), ("chinese", True), ("mixed", False))}
    for case in list(wanted):
        if lacking := missing_models(model_for(*case)):
            print(
                f"read back, {case[0]}{' vertical' if case[1] else ''}: skipped, Tesseract lacks {', '.join(lacking)}"
            )
            del wanted[case]
    corpus, faces, index = read_corpus(), find_faces(), 0
    by_name = {face.name: face for face in faces}
    while any(len(pages) < config.read_samples for pages in wanted.values()):
        page = make(generator(READ_SEED, index, "read back"), config.size, corpus, faces)
        pages = wanted.get((page.record["language"], page.record["vertical"]))
        if pages is not None and len(pages) < config.read_samples:
            pages.append(page)
        index += 1

    def distances(page) -> tuple[float, float]:
        language, vertical = page.record["language"], page.record["vertical"]
        style = Style(by_name[page.record["font"]], 32, leading=1.5, vertical=vertical)
        plain = set_passage("\n".join(line.text for line in page.lines), style, 4000, 4000)
        plain_image = np.pad(255 - plain.coverage, 16, constant_values=255)[:, :, None].repeat(3, 2)
        text = normalize(" ".join(line.text for line in page.lines), language)
        seen = [
            read(image, page_lines, language, vertical)
            for image, page_lines in ((page.image, page.lines), (plain_image, plain.lines))
        ]
        return tuple(edit_distance(s, text) / max(len(s), len(text)) for s in seen)

    rng = np.random.default_rng(0)
    for (language, vertical), pages in wanted.items():
        with ThreadPoolExecutor(config.workers) as pool:
            values = np.array(list(pool.map(distances, pages)))
        name = f"{language}{' vertical' if vertical else ''}"
        yield _reading(rng, name, values)
        common = np.array([is_common("".join(line.text for line in page.lines)) for page in pages])
        if language == "chinese":
            yield _reading(rng, f"{name}, common characters", values[common])


def _reading(rng, name: str, values) -> dict:
    import numpy as np

    pages = values[:, 0]
    low, high = np.quantile(rng.choice(pages, (2000, len(pages))).mean(1), [0.025, 0.975])
    row = {"measure": "read back", "kind": name, "pages": len(pages), "mean_distance": float(pages.mean())}
    return row | {"low": float(low), "high": float(high), "control": float(values[:, 1].mean())}


def missing_glyphs(config: Config) -> dict:
    """Characters without a glyph in their page's font."""
    from matplotlib.ft2font import FT2Font

    from data_pipeline.synthesis.corpus import read_corpus
    from data_pipeline.synthesis.fonts import find_faces
    from data_pipeline.synthesis.picture import generator
    from data_pipeline.synthesis.pure import make

    corpus, faces = read_corpus(), find_faces()
    fonts = {face.name: FT2Font(str(face.path), face_index=face.index) for face in faces}
    characters = missing = 0
    for index in range(config.glyph_samples):
        page = make(generator(0, index, "glyphs"), 128, corpus, faces)
        codes = [fonts[page.record["font"]].get_char_index(ord(c)) for line in page.lines for c in line.text]
        characters += len(codes)
        missing += codes.count(0)
    return {"measure": "glyphs", "pages": config.glyph_samples, "characters": characters, "missing": missing}


if __name__ == "__main__":
    run(main, Config)
