"""Evidence: the same to the last bit however it came together; files, names and records that survive; refusals."""

import csv
import dataclasses
import gzip
import hashlib
import itertools
import json
import os
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from parchgrad.defaults import Defaults
from parchgrad.errors import DataError, EvidenceError
from parchgrad.evidence import (
    DIGEST_BYTES,
    IMAGES_FILE,
    Evidence,
    Observation,
    Subject,
    digest_of,
    used_digests,
)

LABELS = ("cat", "dog", "tree", "bus")
SUBJECT = Subject(
    model_name="net", model_version="1", weights_sha256="ab", labels=LABELS, preprocessing="{}",
    layers={"first": 3, "second": 4}, idle_layers=(), left_out=("third",), layer_patterns=("*", "!third"),
    statistics_point="convolution", sample_images=6, seed=3,
)  # fmt: skip
# What file systems and people come up with; the last is no UTF-8.
NAMES = (
    "cat/a b.png", "cat/tab\tin.png", "cat/new\nline.png", "cat/return\r.png", 'cat/"quoted".png', "cat/'.png",
    "cat/\\n.png", "cat/ü漢.png", "cat/both\r\n.png", '"', "part-0.parquet#17", os.fsdecode(b"cat/\xff\xfe.png"),
)  # fmt: skip


def seen(start, targets, seed=0, names=None, dtype=np.float32, bad=()):
    """One observation an image, image `start + i` of class `targets[i]`; features decided by its number."""
    features = [np.random.default_rng([seed, start + i]).exponential(1.0, 7) for i in range(len(targets))]
    names = names or [f"{LABELS[t]}/{start + i}.png" for i, t in enumerate(targets)]
    digests = b"".join(digest_of(b"%d %d" % (seed, start + i)) for i in range(len(targets)))
    return Observation(
        np.array(features, dtype).reshape(-1, 7), np.array(targets, np.int64), list(names),
        np.frombuffer(digests, np.uint8).reshape(-1, DIGEST_BYTES), list(bad),
    )  # fmt: skip


def part(observation, places):
    """Some images of an observation, in that order."""
    places = list(places)
    return Observation(
        observation.features[places], observation.targets[places], [observation.names[i] for i in places],
        observation.digests[places],
    )  # fmt: skip


def of(*observations, subject=SUBJECT, classes=(0, 1, 3)):
    evidence = Evidence(subject, classes)
    for observation in observations:
        evidence.observe(observation)
    return evidence


def saved(evidence, path):
    evidence.in_order().save(path)
    return path.read_bytes()


# Order and grouping

TARGETS = [0, 1, 3, 0, 1, 3, 0, 0, 1, 3, 1, 0, 3, 0, 0, 1]


@settings(deadline=None, max_examples=60)
@given(
    order=st.permutations(range(len(TARGETS))),
    cuts=st.lists(st.integers(0, len(TARGETS)), max_size=5),
    added=st.lists(st.booleans(), min_size=6, max_size=6),
    room=st.sampled_from([0, 1, 2, 3, 7, 5000]),
)
def test_any_order_and_grouping_gives_the_same_file(tmp_path_factory, order, cuts, added, room):
    """Observed directly, or as evidence of its own that is added, whatever the room for the sample."""
    folder = tmp_path_factory.mktemp("evidence")
    subject = dataclasses.replace(SUBJECT, sample_images=room)
    everything = seen(0, TARGETS)
    bounds = [0, *sorted(cuts), len(order)]
    pieces = [order[a:b] for a, b in itertools.pairwise(bounds)]
    evidence = Evidence(subject, (0, 1, 3))
    for places, as_evidence in zip(pieces, added, strict=False):
        if as_evidence:
            # Of its own classes only, as a worker that met no others has it; the room is shared among all.
            own = Evidence(subject, set(everything.targets[list(places)].tolist()) or {0}, sample_classes=3)
            own.observe(part(everything, places))
            evidence.add(own)
        else:
            evidence.observe(part(everything, places))
    assert saved(evidence, folder / "a") == saved(of(everything, subject=subject), folder / "b")
    for name in ("a", "b"):
        (folder / name).unlink()


@settings(deadline=None, max_examples=40)
@given(
    owners=st.lists(st.integers(0, 2), min_size=len(TARGETS), max_size=len(TARGETS)),
    order=st.permutations(range(3)),
    room=st.sampled_from([0, 1, 2, 4, 5000]),
)
def test_three_parts_merged_in_any_order_are_one_evidence(tmp_path_factory, owners, order, room):
    """Parts have other classes each, so their shares of the sample differ, and lose nothing that the whole needs."""
    folder = tmp_path_factory.mktemp("evidence")
    subject = dataclasses.replace(SUBJECT, sample_images=room)
    everything = seen(0, TARGETS)
    parts = []
    for owner in range(3):
        places = [i for i, mine in enumerate(owners) if mine == owner]
        classes = {TARGETS[i] for i in places} or {0}
        parts.append(of(part(everything, places), subject=subject, classes=classes))
    one, two, three = (parts[i] for i in order)
    before = [pickle.dumps(p.moments) for p in parts]
    merged = one.merge(two).merge(three)
    assert saved(merged, folder / "a") == saved(of(everything, subject=subject), folder / "b")
    assert before == [pickle.dumps(p.moments) for p in parts], "no part changes"
    for name in ("a", "b"):
        (folder / name).unlink()


def test_the_sample_is_the_lowest_hashes_of_each_class():
    """By hand: two of each class have room, and they are those whose hash under the seed is lowest."""
    everything = seen(0, TARGETS)
    key = str(SUBJECT.seed).encode()
    hashes = [int.from_bytes(hashlib.blake2b(d.tobytes(), digest_size=8, key=key).digest(), "little")
              for d in everything.digests]  # fmt: skip
    expected = []
    for target in (0, 1, 3):
        mine = sorted((hashes[i], i) for i, t in enumerate(TARGETS) if t == target)
        expected += [everything.features[i] for _, i in mine[:2]]
    np.testing.assert_array_equal(of(everything).sample.features(), expected)


def test_with_more_classes_than_room_the_lowest_hashes_of_all_are_the_sample():
    subject = dataclasses.replace(SUBJECT, sample_images=2)
    evidence = of(seen(0, TARGETS), subject=subject)
    priorities, features, _ = evidence.sample.arrays()
    assert len(priorities) == 3
    chosen = np.sort(np.argsort(priorities)[:2])
    np.testing.assert_array_equal(evidence.sample.features(), features[chosen])


def test_moments_are_those_of_the_features():
    everything = seen(0, TARGETS)
    evidence = of(everything)
    for row, target in enumerate((0, 1, 3)):
        mine = everything.features[everything.targets == target].astype(np.float64)
        assert evidence.moments.count[row] == len(mine)
        np.testing.assert_allclose(evidence.moments.mean()[row], mine.mean(0), rtol=1e-14)
        np.testing.assert_allclose(evidence.moments.m2()[row], mine.var(0) * len(mine), rtol=1e-12)


def test_a_class_of_no_evidence_is_refused():
    with pytest.raises(EvidenceError, match="Class 2 is none of this evidence's classes"):
        of(seen(0, [0, 2]))


# Files


def test_a_file_gives_back_all_of_it(tmp_path):
    first = seen(0, [0] * len(NAMES), names=NAMES, bad=[("cat/\udcff.png", "no image"), ("x\ty", "reason\nof two")])
    evidence = of(first, seen(50, [3, 1, 1]))
    evidence.known, evidence.sources = 4, [{"root": "\udcff", "images": 3}]
    evidence.save(tmp_path / "e", note="a note")
    again, extra, note = Evidence.load(tmp_path / "e")
    assert (extra, note) == ({}, "a note")
    assert again.names == evidence.names == [*NAMES, "bus/50.png", "dog/51.png", "dog/52.png"]
    assert (again.subject, again.classes, again.known) == (evidence.subject, evidence.classes, 4)
    assert (again.bad, again.sources) == (evidence.bad, evidence.sources)
    assert again.targets.tolist() == evidence.targets.tolist()
    again.save(tmp_path / "f", note="a note")
    assert (tmp_path / "f").read_bytes() == (tmp_path / "e").read_bytes()
    more = seen(90, [0, 3, 3])
    evidence.observe(more)
    again.observe(more)
    assert saved(again, tmp_path / "g") == saved(evidence, tmp_path / "h"), "it goes on as it would have"


def test_evidence_of_no_images_is_saved_and_goes_on(tmp_path):
    evidence = of()
    evidence.save(tmp_path / "e")
    again = Evidence.load(tmp_path / "e")[0]
    assert (again.images, again.names, again.digests.shape) == (0, [], (0, DIGEST_BYTES))
    again.observe(seen(0, TARGETS))
    assert saved(again, tmp_path / "f") == saved(of(seen(0, TARGETS)), tmp_path / "g")
    merged = of(seen(0, TARGETS)).merge(of(classes=(0,)))
    assert saved(merged, tmp_path / "h") == (tmp_path / "g").read_bytes()
    with pytest.raises(DataError, match=r"Class 0 \(cat\) has 0 readable image"):
        of().table(Defaults())


def test_a_truncated_file_is_refused_wherever_it_ends(tmp_path):
    of(seen(0, TARGETS)).save(tmp_path / "whole")
    data = (tmp_path / "whole").read_bytes()
    for length in [*range(0, len(data), max(1, len(data) // 40)), 7, 8, 9, len(data) - 1]:
        (tmp_path / "cut").write_bytes(data[:length])
        with pytest.raises(EvidenceError, match=r"^Evidence '.*cut' cannot be read: [^\n]*$"):
            Evidence.load(tmp_path / "cut")


def test_no_file_a_folder_and_a_file_of_another_kind_are_refused(tmp_path):
    save_file({"x": torch.zeros(2)}, tmp_path / "other")
    for path in (tmp_path / "absent", tmp_path, tmp_path / "other"):
        with pytest.raises(EvidenceError, match="cannot be read"):
            Evidence.load(path)


@pytest.mark.parametrize("left_out", ["count", "squares_low", "sample_features", "names", "digests", "targets"])
def test_a_file_that_lacks_a_part_is_refused(tmp_path, left_out):
    of(seen(0, TARGETS)).save(tmp_path / "e")
    rewrite(tmp_path / "e", lambda tensors, header: tensors.pop(left_out))
    with pytest.raises(EvidenceError, match=left_out):
        Evidence.load(tmp_path / "e")


def test_another_format_version_is_refused_by_its_number(tmp_path):
    of(seen(0, TARGETS)).save(tmp_path / "e")
    rewrite(tmp_path / "e", lambda tensors, header: header.update(format_version=99))
    with pytest.raises(EvidenceError, match=r"format version 99; this library reads \d"):
        Evidence.load(tmp_path / "e")


def test_names_that_are_too_few_are_refused(tmp_path):
    of(seen(0, TARGETS)).save(tmp_path / "e")
    rewrite(tmp_path / "e", lambda tensors, header: tensors.update(names=tensors["names"][:20].clone()))
    with pytest.raises(EvidenceError, match="names for 16 images"):
        Evidence.load(tmp_path / "e")


def rewrite(path, change):
    """Change a file's tensors and header in place."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  # no mapping
    header = json.loads(metadata["evidence"])
    change(tensors, header)
    save_file(tensors, path, {**metadata, "evidence": json.dumps(header)})


# What does not add up

OTHERS = {
    "model_name": "other",
    "model_version": "2",
    "weights_sha256": "cd",
    "labels": ("cat", "dog", "tree", "tram"),
    "preprocessing": '{"size": [8, 8]}',
    "layers": {"first": 3, "third": 4},
    "layer_patterns": ("*",),
    "left_out": (),
    "statistics_point": "activation",
    "sample_images": 5,
    "seed": 4,
}


@pytest.mark.parametrize("what", OTHERS)
def test_evidence_of_another_subject_is_refused_by_what_differs(what):
    other = dataclasses.replace(SUBJECT, **{what: OTHERS[what]})
    with pytest.raises(EvidenceError, match=f"^The evidence does not add up: {what} differs"):
        of(seen(0, [0, 1])).merge(of(seen(9, [0, 1]), subject=other))


def test_an_image_in_both_is_refused_by_its_name():
    with pytest.raises(EvidenceError, match=r"^2 image\(s\) are in both, such as 'renamed'; they would count twice.$"):
        of(seen(0, [0, 1, 3])).merge(of(seen(1, [1, 3, 0], names=["renamed", "b", "c"])))


# The record of images


def test_the_record_of_images_is_what_the_csv_module_reads(tmp_path):
    evidence = of(seen(0, [0] * len(NAMES), names=NAMES), seen(50, [3, 1, 1])).in_order()
    (tmp_path / IMAGES_FILE).write_bytes(gzip.compress(evidence.images_record()))
    with gzip.open(tmp_path / IMAGES_FILE, "rt", encoding="utf-8", errors="surrogateescape", newline="") as file:
        head, *lines = csv.reader(file, delimiter="\t")
    assert head == ["digest", "class", "name"]
    assert [line[2] for line in lines] == evidence.names
    assert sorted(line[2] for line in lines if line[1] == "0") == sorted(NAMES)
    assert [line[1] for line in lines] == [str(t) for t in evidence.targets]
    assert [line[0] for line in lines] == [d.tobytes().hex() for d in evidence.digests]
    assert used_digests(tmp_path) == {line[0] for line in lines}
    assert lines[0][0] in {digest_of(b"0 %d" % i).hex() for i in range(len(NAMES))}


def test_no_record_is_none_and_no_images_are_none_used(tmp_path):
    assert used_digests(None) is None
    assert used_digests(tmp_path) is None
    (tmp_path / IMAGES_FILE).write_bytes(gzip.compress(of().images_record()))
    assert used_digests(tmp_path) == frozenset()


def test_a_record_that_cannot_be_read_is_refused_wherever_it_is_damaged(tmp_path):
    """Cut short anywhere, or with any byte changed: refused, or as it was (a byte of gzip's own header)."""
    record = gzip.compress(of(seen(0, TARGETS)).in_order().images_record(), mtime=0)
    whole = {d.tobytes().hex() for d in of(seen(0, TARGETS)).digests}
    path = tmp_path / IMAGES_FILE
    refused = 0
    for damaged in [
        *(record[:length] for length in range(len(record))),
        *(record[:i] + bytes([record[i] ^ bit]) + record[i + 1 :] for i in range(len(record)) for bit in (1, 128)),
    ]:
        path.write_bytes(damaged)
        try:
            found = used_digests(tmp_path)
        except EvidenceError:
            refused += 1
        else:
            assert found == whole
    assert refused > 2 * len(record)
    path.write_bytes(gzip.compress(b"name,digest\n"))
    with pytest.raises(EvidenceError, match="its first line is not"):
        used_digests(tmp_path)


# The table


def test_bad_images_are_listed_in_words_that_can_be_written(tmp_path):
    """A name that is no UTF-8 would fit neither in a JSON file nor on a terminal."""
    evidence = of(seen(0, TARGETS, bad=[(os.fsdecode(b"cat/\xff.png"), "'\udcff' is empty"), ("cat/a.png", "empty")]))
    built = evidence.table(Defaults()).built
    json.dumps(built, ensure_ascii=False).encode()
    assert built["bad_images"] == [["cat/a.png", "empty"], ["cat/\\udcff.png", "'\\udcff' is empty"]]
    evidence.table(Defaults()).save(tmp_path)


def test_a_table_needs_two_classes_and_two_images_of_each():
    with pytest.raises(DataError, match=r"Class 3 \(bus\) has 1 readable image\(s\); a class needs at least 2"):
        of(seen(0, [0, 0, 1, 1, 3])).table(Defaults())
    with pytest.raises(DataError, match="images of 1 class"):
        of(seen(0, [0, 0, 0]), classes=(0,)).table(Defaults())
    with pytest.raises(EvidenceError, match="Control is 'much', expected one of none, benjamini_hochberg"):
        of(seen(0, TARGETS)).table(Defaults(), "much")


@settings(deadline=None, max_examples=25)
@given(order=st.permutations(range(len(TARGETS))))
def test_float64_features_and_wide_ranges_give_the_same_table_in_any_order(order):
    """Beyond what a pair of float64 holds exactly the last bits of the sums may move, but not the table's."""
    everything = seen(0, TARGETS, dtype=np.float64)
    scale = 10.0 ** np.random.default_rng(0).uniform(-12, 3, everything.features.shape)
    wide = dataclasses.replace(everything, features=everything.features * scale)
    for observation in (everything, wide):
        table, other = of(observation).table(Defaults()), of(part(observation, order)).table(Defaults())
        for name, layer in table.layers.items():
            for field in dataclasses.fields(layer):
                mine, theirs = getattr(layer, field.name), getattr(other.layers[name], field.name)
                assert mine.equal(theirs), (name, field.name)
