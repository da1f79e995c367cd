"""The benchmark of ingest runs, and its verdict is about what it prints."""

import bench_ingest
import pytest


def test_it_runs(tmp_path, capsys):
    assert bench_ingest.main(["--millions", "4", "--steps", "3", "--tries", "1", "--dir", str(tmp_path)]) in (0, 1)
    printed = capsys.readouterr().out
    assert printed.count("times as long") >= 3
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("largest", "arguments", "says"),
    [
        ((2.9, 1.4, 4.0), [], "within all bounds"),
        ((3.1, 1.4, 4.0), [], "3.10 times as long as reading"),
        ((3.1, 1.4, 4.0), ["--cached"], "within all bounds"),
        ((2.9, 1.6, 4.0), [], "1.60 GB is more than 1.5"),
        ((2.9, 1.4, 6.1), [], "not linear: 4.00, then 6.10"),
    ],
)
def test_what_is_out_of_bounds_fails(monkeypatch, capsys, largest, arguments, says):
    monkeypatch.setattr(
        bench_ingest, "bench", lambda elements, given: largest if elements == 140e6 else (9.0, 9.0, 4.0)
    )
    assert bench_ingest.main(arguments) == (says != "within all bounds")
    assert says in capsys.readouterr().out
