"""The verdict of the benchmark of recording is about what it measured; the runs themselves take minutes."""

import json

import bench_record
import pytest

FLAT = (800_000_000, 801_000_000)


@pytest.mark.parametrize(
    ("times", "grown", "says"),
    [
        ({"window": [10.0, 12.0, 20.0], "run": [10.4, 12.2, 40.0]}, {"window": FLAT, "run": FLAT}, "within all bounds"),
        ({"window": [10.0], "run": [10.6]}, {"window": FLAT, "run": FLAT}, "1.060 times as long is more than 1.05"),
        ({"window": [1.0], "run": [1.0]}, {"window": FLAT, "run": (8 * 10**8, 9 * 10**8)}, "memory grows by 100 MB"),
        ({"window": [1.0], "run": [1.0]}, {"window": (8 * 10**8, 9 * 10**8), "run": (8 * 10**8, 9 * 10**8)}, "within"),
    ],
)
def test_its_verdict_is_that_of_what_it_measured(tmp_path, capsys, times, grown, says):
    code = bench_record.judge(tmp_path, times, grown, once=False)
    printed = capsys.readouterr().out
    assert says in printed
    assert code == ("within all bounds" not in printed)


def test_seconds_and_memory_are_of_the_last_two_thirds(tmp_path):
    lines = [{"step": n, "data": {"timing_s/step": float(n), "timing_s/save_checkpoint": 0.5}} for n in range(1, 10)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 10, "da')
    assert bench_record.seconds(tmp_path, 9) == sum(range(4, 10)) - 6 * 0.5
    assert bench_record.growth({1: 5, 4: 7, 9: 8}, 9) == (7, 8)
