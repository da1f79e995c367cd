"""The benchmark of ingest runs, and its verdict is about what it prints."""

import re

import bench_ingest
import pytest

LINE = re.compile(r"([\d.]+) times as long .*, ([\d.]+) processor ns a parameter and step, peak ([\d.]+) GB")


def test_its_verdict_is_that_of_what_it_measured(tmp_path, capsys):
    code = bench_ingest.main(["--millions", "4", "--steps", "3", "--tries", "1", "--dir", str(tmp_path)])
    printed = capsys.readouterr().out
    sizes = [tuple(map(float, found)) for found in LINE.findall(printed)]
    assert len(sizes) == 3
    assert all(figure > 0 for size in sizes for figure in size)
    times, _, peak = sizes[-1]
    each = [size[1] for size in sizes]
    # Printed with two digits: a figure that is rounded onto its bound is left to the test below.
    verdicts = {
        "times as long as reading is more than 3": (times, 3.0),
        "GB is more than 1.5": (peak, 1.5),
        "not linear": (each[-1], 1.5 * min(each)),
    }
    for says, (figure, bound) in verdicts.items():
        assert (says in printed) == (figure > bound) or abs(figure - bound) < 0.02, (says, printed)
    assert code == ("within all bounds" not in printed)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("largest", "cached", "says"),
    [
        ((2.9, 1.4, 4.0), False, None),
        ((3.1, 1.4, 4.0), False, "3.10 times as long as reading"),
        ((3.1, 1.4, 4.0), True, None),
        ((2.9, 1.6, 4.0), False, "1.60 GB is more than 1.5"),
        ((2.9, 1.4, 6.1), False, "not linear: 4.00, then 6.10"),
    ],
)
def test_what_is_out_of_bounds_is_named(largest, cached, says):
    wrong = bench_ingest.out_of_bounds([(9.0, 9.0, 4.0), (9.0, 9.0, 4.0), largest], cached)
    assert len(wrong) == (says is not None)
    assert not wrong or says in wrong[0]
