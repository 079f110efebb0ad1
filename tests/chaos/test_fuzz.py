"""Whatever happens to the files of a store, the rows that are served are right."""

from collections.abc import Iterator

import pytest

from cachefreeze.store import format as store_format

from . import fuzz
from .fuzz import ANEW, GONE_ON, HARMLESS, KINDS, MENDED, REFUSED, Fuzzer, Result

DAMAGES = 600
SEED = 0


@pytest.fixture(scope="module")
def fuzzer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fuzzer]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store_format, "CHUNK_BYTES", fuzz.CHUNK_BYTES)
        yield Fuzzer(tmp_path_factory.mktemp("fuzz"))


@pytest.fixture(scope="module")
def results(fuzzer: Fuzzer) -> list[Result]:
    return list(fuzzer.run(range(DAMAGES), SEED))


def test_no_damage_serves_a_wrong_row_or_stops_the_run_or_is_passed_over(
    results: list[Result],
) -> None:
    problems = [str(result) for result in results if result.problem]
    assert not problems, "\n".join(problems)


def test_every_kind_of_damage_was_done_and_every_kind_of_store_damaged(
    results: list[Result],
) -> None:
    for damages, half_written in ((fuzz.COMMITTED, False), (fuzz.HALF, True)):
        done = [result for result in results if result.half_written == half_written]
        assert {result.damage for result in done} == set(damages)
        assert {result.kind for result in done} == {kind.name for kind in KINDS}
    assert {result.outcome for result in results} >= {HARMLESS, MENDED, ANEW, GONE_ON, REFUSED}


def test_damage_to_chunks_costs_these_chunks_and_not_the_store(results: list[Result]) -> None:
    of_chunks = {"chunks swapped", "swapped between splits", "chunk over another"}
    of_chunks |= {"split of another store", "other rows, own checksum"}
    done = [each for each in results if each.damage in of_chunks and not each.half_written]
    assert len(done) > 20
    assert {result.outcome for result in done} == {MENDED}


def test_edited_metadata_are_never_believed_and_foreign_files_never_matter(
    results: list[Result],
) -> None:
    outcomes: dict[str, set[str]] = {}
    for result in results:
        if not result.half_written:
            outcomes.setdefault(result.damage, set()).add(result.outcome)
    assert outcomes["metadata edited"] == {ANEW}
    assert outcomes["foreign files"] == {HARMLESS}


def test_a_damage_can_be_done_again_by_its_number(fuzzer: Fuzzer, results: list[Result]) -> None:
    for result in results[:10]:
        (again,) = fuzzer.run([0], SEED + result.number)
        assert (again.damage, again.what, again.outcome) == (
            result.damage,
            result.what,
            result.outcome,
        )


def test_the_table_counts_every_damage_once(results: list[Result]) -> None:
    lines = [line.split() for line in fuzz.tables(results) if line.startswith("all ")]
    assert sum(int(line[1]) for line in lines) == DAMAGES
    assert sum(int(count) for line in lines for count in line[2:]) == DAMAGES
