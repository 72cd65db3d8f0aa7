"""Queries that share scans: every one has the answer it would have had alone."""

import asyncio
import threading
import time
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hashdist.ground.errors import InvalidInput
from hashdist.index import Index, create_index
from hashdist.service.batching import Answer, Batches


class Counting(Index):
    """An index that notes how many queries every search had."""

    def __init__(self, inner: Index) -> None:
        super().__init__(inner.versions, inner.view.version)
        self.asked: list[int] = []

    def search(self, codes: Any, *more: Any, **named: Any) -> Any:
        self.asked.append(len(codes))
        time.sleep(0.005)
        return super().search(codes, *more, **named)


@pytest.fixture(scope="module")
def indexes(tmp_path_factory: pytest.TempPathFactory) -> list[Counting]:
    rng = np.random.default_rng(0)
    made = []
    for number in range(2):
        index = create_index(str(tmp_path_factory.mktemp("index") / str(number)), 16)
        keys = [f"{number}-{row:03d}" for row in range(200)]
        index.append(rng.integers(0, 256, (200, 2), np.uint8), keys, {"size": list(range(200))})
        made.append(Counting(index))
    return made


Query = tuple[int, int, int, str]


async def together(indexes: list[Counting], queries: list[Query]) -> list[Any]:
    batches = Batches(2, time.perf_counter)
    try:
        tasks = [
            batches.search(indexes[which], np.array([code % 256, code // 256], np.uint8), k, where)
            for which, code, k, where in queries
        ]
        return await asyncio.gather(*tasks, return_exceptions=True)
    finally:
        batches.close()


@settings(max_examples=30, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.integers(0, 1),
            st.integers(0, 65535),
            st.sampled_from([1, 3, 99, 150, 500]),
            st.sampled_from(["", "size < 50"]),
        ),
        min_size=1,
        max_size=40,
    )
)
def test_company_changes_no_answer(indexes: list[Counting], queries: list[Query]) -> None:
    for (which, code, k, where), found in zip(queries, asyncio.run(together(indexes, queries)), strict=True):
        alone = Index.search(indexes[which], np.array([[code % 256, code // 256]], np.uint8), k, where or None)
        assert isinstance(found, Answer)
        assert found.ids.tolist() == alone.ids[0].tolist()
        assert found.distances.tolist() == alone.distances[0].tolist()
        assert found.keys == alone.keys()[0]


def test_many_queries_take_few_scans(indexes: list[Counting]) -> None:
    indexes[0].asked.clear()
    found = asyncio.run(together(indexes, [(0, code, 10, "") for code in range(300)]))
    assert len(found) == sum(indexes[0].asked) == 300
    assert indexes[0].asked == [1, 256, 43]


def test_a_deep_scan_gathers_its_like_and_holds_up_no_one_else(indexes: list[Counting]) -> None:
    deep_asked, go_on = [], threading.Event()

    class Held(Counting):
        def search(self, codes: Any, k: int = 10, *more: Any, **named: Any) -> Any:
            if k > 100:
                deep_asked.append(len(codes))
                assert go_on.wait(30)
            return super().search(codes, k, *more, **named)

    async def asked() -> None:
        index, batches, code = Held(indexes[0]), Batches(2, time.perf_counter), np.zeros(2, np.uint8)
        try:
            deep = [asyncio.create_task(batches.search(index, code, 150, "")) for _ in range(3)]
            for _ in range(3):
                assert len((await asyncio.wait_for(batches.search(index, code, 10, ""), 30)).ids) == 10
            assert not any(one.done() for one in deep)
            go_on.set()
            assert {len(one.ids) for one in await asyncio.gather(*deep)} == {150}
        finally:
            go_on.set()
            batches.close()

    asyncio.run(asked())
    assert deep_asked == [1, 2]


def test_an_error_reaches_those_who_asked_for_it_and_no_one_else(indexes: list[Counting]) -> None:
    queries = [(0, 5, 3, ""), (0, 6, 3, "no_such_column > 3"), (0, 7, 3, "")] * 3
    found = asyncio.run(together(indexes, queries))
    assert [isinstance(one, InvalidInput) for one in found] == [False, True, False] * 3
