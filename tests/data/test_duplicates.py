import hashlib
from collections.abc import Iterable

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from chestct.config.schema import PhantomConfig
from chestct.data import duplicates
from chestct.data.duplicates import group, link
from chestct.imaging.preprocess import thumbnail
from chestct.phantom.thorax import display, draw
from tests.conftest import real
from tests.data.changes import CHANGES

pytestmark = pytest.mark.usefixtures("thorough_ingest")

SIDE = 112


def find_pairs(images: Iterable[np.ndarray], content: list[str]) -> pd.DataFrame:
    thumbs = [thumbnail(image) for image in images]
    return duplicates.find_pairs(np.stack(thumbs) if thumbs else np.empty((0, 56, 56), np.uint8), content)


def digest(image: np.ndarray) -> str:
    return hashlib.sha256(image.tobytes()).hexdigest()


def pair_set(pairs: pd.DataFrame, kind: str) -> set[tuple[int, int]]:
    chosen = pairs[pairs["kind"] == kind]
    return set(zip(chosen["a"], chosen["b"], strict=True))


def partition(labels: np.ndarray) -> set[frozenset[int]]:
    return {frozenset(np.flatnonzero(labels == label).tolist()) for label in np.unique(labels)}


def blob(seed: int) -> np.ndarray:
    """A body with lungs and random vessels; two seeds share the layout, not the vessels."""
    rng = np.random.default_rng(seed)
    axis = np.arange(SIDE) / SIDE * 2 - 1
    y, x = axis[:, None], axis
    lungs = ((np.abs(x) - 0.4) / 0.28) ** 2 + (y / 0.42) ** 2 < 1
    image = np.where((x / 0.9) ** 2 + (y / 0.66) ** 2 < 1, 0.6, 0.02) - 0.4 * lungs
    size = rng.uniform(0.02, 0.06, 40)
    rows, columns = (np.exp(-(((axis[:, None] - at) / size) ** 2)) for at in rng.uniform(-0.6, 0.6, (2, 40)))
    image += 0.4 * rows @ columns.T
    return np.uint8(255 * np.clip(image, 0, 1))


def phantom(index: int) -> np.ndarray:
    subtype = ("normal", "adenocarcinoma", "large_cell", "squamous")[index % 4]
    drawn = draw(np.random.default_rng([21, index]), subtype, PhantomConfig())
    return display(drawn.hu, drawn.window)


@pytest.fixture(scope="module")
def drawn() -> list[np.ndarray]:
    """24 phantoms that no two share a body."""
    return [phantom(i) for i in range(24)]


@pytest.mark.parametrize("first", range(0, len(CHANGES), 2))
def test_changed_copies_are_found_and_nothing_else(drawn: list[np.ndarray], first: int) -> None:
    """All but one in 50 shifts of 5 % both ways, the hardest change. Two changes at once, each of slices of its own."""
    images, copies = [*drawn], {}
    for at, name in zip((0, 12), [*CHANGES][first : first + 2], strict=False):
        changed = [CHANGES[name](Image.fromarray(drawn[i]), np.random.default_rng([22, i])) for i in range(at, at + 10)]
        copies[name] = {(at + k, len(images) + k) for k in range(10)}
        images += [np.asarray(image.convert("L")) for image in changed]
    pairs = find_pairs(images, [digest(image) for image in images])
    found = set(zip(pairs["a"], pairs["b"], strict=True))
    assert found <= set().union(*copies.values())
    for name, expected in copies.items():
        assert len(found & expected) >= (9 if "5 % both ways" in name else 10), name


@pytest.mark.slow
def test_of_copies_planted_among_many_slices_one_in_two_hundred_is_missed_at_most() -> None:
    slices, makers = [phantom(i) for i in range(800)], list(CHANGES.values())
    order = np.random.default_rng(0).permutation(800)[:600]
    copies = [
        makers[k % len(makers)](Image.fromarray(slices[i]), np.random.default_rng([22, int(i)])).convert("L")
        for k, i in enumerate(order)
    ]
    images = [*slices, *map(np.asarray, copies)]
    groups = group(len(images), find_pairs(images, [digest(image) for image in images]))
    assert (groups[800:] == groups[order]).sum() >= 597
    assert len(set(groups[:800].tolist())) == 800  # no two of different bodies are joined


def test_equal_content_is_chained_in_order_and_compared_once() -> None:
    images = np.stack([blob(0), blob(1), blob(0), blob(0)])
    pairs = find_pairs(images, ["x", "y", "x", "x"])
    assert pair_set(pairs, "exact") == {(0, 2), (2, 3)}
    assert len(pairs) == 2
    assert (pairs["similarity"] == 1).all()


def test_groups_do_not_depend_on_the_order_of_the_slices() -> None:
    distinct = [blob(i) for i in range(30)]
    images = np.stack([*distinct, *(np.roll(image, 3, axis=1) for image in distinct[:12]), *distinct[:4]])
    content = [digest(image) for image in images]
    order = np.random.default_rng(0).permutation(len(images))
    straight = find_pairs(images, content)
    shuffled = find_pairs(images[order], [content[i] for i in order])
    mapped = np.empty(len(images), dtype=int)
    mapped[order] = group(len(images), shuffled)
    assert partition(mapped) == partition(group(len(images), straight))
    assert len(partition(mapped)) == 30
    near = sorted(straight.loc[straight["kind"] == "near", "similarity"])
    assert near == sorted(shuffled.loc[shuffled["kind"] == "near", "similarity"])


def test_constant_and_nearly_empty_slices_have_exact_copies_only() -> None:
    flat = np.full((SIDE, SIDE), 7, np.uint8)
    flat[:, : SIDE // 2] = 9  # differs from a constant by less than JPEG noise
    marks = np.zeros((2, SIDE, SIDE), np.uint8)  # two empty slices with the same sign burnt in
    marks[:, 50:70, 30:60] = np.random.default_rng(0).integers(0, 256, (10, 15)).repeat(2, 0).repeat(2, 1)
    images = np.stack(
        [np.zeros((SIDE, SIDE), np.uint8), np.full((SIDE, SIDE), 90, np.uint8), flat, blob(0), flat, *marks]
    )
    pairs = find_pairs(images, ["black", "grey", "flat", "slice", "flat", "mark", "another mark"])
    assert pairs[["a", "b", "kind"]].to_numpy().tolist() == [[2, 4, "exact"]]


def test_a_body_of_another_shape_is_no_copy() -> None:
    stretched = np.zeros((SIDE, SIDE), np.uint8)
    stretched[:, 9:103] = np.asarray(Image.fromarray(blob(0)).resize((94, SIDE), Image.Resampling.BILINEAR))
    assert find_pairs(np.stack([blob(0), stretched]), ["a", "b"]).empty


@pytest.mark.parametrize("n", [0, 1, 2, 3])
def test_few_slices_work(n: int) -> None:
    images = np.stack([blob(0), np.roll(blob(0), 2, axis=0), blob(5)])[:n]
    pairs = find_pairs(images, list("abc")[:n])
    assert pairs.columns.tolist() == ["a", "b", "similarity", "kind"]
    assert group(n, pairs).tolist() == [0, 0, 1][:n]


def test_more_copies_than_a_list_of_candidates_holds_are_one_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(duplicates, "NEIGHBOURS", 2)
    rng = np.random.default_rng(0)
    noisy = [np.uint8(np.clip(blob(0) + rng.normal(0, 3, (SIDE, SIDE)), 0, 255)) for _ in range(100)]
    images = np.stack([*noisy, *(blob(i) for i in range(1, 20))])
    pairs = find_pairs(images, [digest(image) for image in images])
    assert group(len(images), pairs).tolist() == [0] * 100 + list(range(1, 20))
    assert len(pairs) < 100 * 2 * duplicates.ROUNDS  # not all with all, which would be 4,950


def test_a_near_copy_is_compared_though_a_dozen_other_slices_look_more_alike() -> None:
    """As happens among neighbouring slices of many patients, whose coarse features differ less than their detail."""
    likeness = np.linspace(1, 0.5, 14)  # of the first slice to each, by the descriptor; the last is its near-copy
    code = np.zeros((14, 14), np.float32)
    code[:, 0], code[range(14), range(14)] = likeness, np.maximum(np.sqrt(1 - likeness**2), likeness * (likeness == 1))
    assert 13 in duplicates._candidates(code, np.arange(14))  # first * 14 + last


@pytest.mark.slow
def test_beside_another_source_all_is_found_that_comparing_all_with_all_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    sources = {}
    for name in ("chest-ct", "iq-oth-nccd"):
        images = (np.asarray(Image.open(path).convert("L")) for path in sorted(real(name).rglob("*.[jp][pn]g")))
        sources |= {digest(image): (name, thumbnail(image)) for image in images}
    content, source, thumbs = [*sources], *zip(*sources.values(), strict=True)
    found = group(len(content), duplicates.find_pairs(np.stack(thumbs), content, source))
    own = source.count("chest-ct")
    monkeypatch.setattr(duplicates, "NEIGHBOURS", own)
    every = duplicates.find_pairs(np.stack(thumbs[:own]), content[:own])
    assert (found[every["a"]] == found[every["b"]]).all()


def test_pairs_are_sought_in_each_source_and_between_sources() -> None:
    moved = [np.roll(blob(i), 3, axis=1) for i in (0, 1)]
    images = [*map(blob, range(8)), *moved]
    thumbs, content = np.stack([thumbnail(image) for image in images]), [digest(image) for image in images]
    pairs = duplicates.find_pairs(thumbs, content, [*"aaaabbbb", "a", "b"])
    assert pair_set(pairs, "near") == {(0, 8), (1, 9)}
    assert len(pairs) == 2


def test_an_empty_key_links_nothing_and_groups_are_numbered_by_their_first_member() -> None:
    pairs = link(["", "s", "t", "t", "s", ""], "series")
    assert pair_set(pairs, "series") == {(1, 4), (2, 3)}
    labels = group(6, pairs)
    assert labels.tolist() == [0, 1, 2, 2, 1, 3]
    assert labels.dtype == np.int64
