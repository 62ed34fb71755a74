"""Distilled vectors of a bundle: exported, read again, and grown with its entities."""

from pathlib import Path

import torch

import dsmip
from dsmip.distillation.vectors import COLUMN, DistilledVectors
from dsmip.linking.bundle import CANDIDATES, read_manifest
from tests.support.scoring.grown import assert_same, colour_files, exported, links_of, record, run_of, two_experts


def test_a_grown_bundle_has_the_vectors_of_an_index_built_anew(narrow_backbone: Path, tmp_path: Path) -> None:
    config, images = two_experts(narrow_backbone), colour_files(tmp_path / "images")
    bundle = exported(tmp_path / "first", config, [record(n) for n in range(6)], candidate_vectors="distilled")
    manifest, _ = read_manifest(bundle)
    assert (manifest.format, CANDIDATES in manifest.model_files) == (2, True)
    linker = dsmip.load(bundle)
    assert links_of(linker, candidates=6) == links_of(linker)  # all entities are candidates

    linker.entities.add([record(6), record(7)], images=images)
    linker.entities.remove(["Q0"])
    linker.entities.update([record(1, 1)], images=images)
    left = [*(record(n) for n in (2, 3, 4, 5, 6, 7)), record(1, 1)]
    anew = dsmip.load(run_of(tmp_path / "anew", config, left).folder)
    for grown in (linker.reload(), dsmip.load(bundle)):
        source = grown.search.candidates.source
        assert isinstance(source, DistilledVectors)
        stored_Eg = torch.cat([table.dense(COLUMN) for table in grown.search.index.tables])
        expected_Eg = torch.cat([source.of(table, "entities") for table in anew.search.index.tables])
        assert stored_Eg.abs().max() > 0
        torch.testing.assert_close(stored_Eg, expected_Eg, atol=1e-4, rtol=1e-4)
        assert links_of(grown, candidates=7) == links_of(grown)
        assert_same(grown, anew)
        linker.entities.compact()
    (segment,) = read_manifest(bundle)[0].all_segments
    assert segment.entities == len(left)
