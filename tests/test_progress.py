from rich.progress import track

from chestct import progress


def test_a_phase_is_one_line_where_there_is_no_terminal_and_nothing_where_nothing_is_done(capsys):
    assert list(progress.steps(iter("abc"), "Reading slices", 3)) == ["a", "b", "c"]
    assert list(progress.steps([], "Features", 0)) == []
    assert list(progress.steps([1], "Quiet", 1, show=False)) == [1]
    progress.phase("Training")
    assert capsys.readouterr().out == "Reading slices (3)\nTraining\n"


def test_a_terminal_gets_a_bar_and_no_lines(monkeypatch, capsys):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    shown = progress.steps([1, 2], "Reading slices", 2)
    assert type(shown) is type(track([]))
    progress.phase("Training")
    assert capsys.readouterr().out == ""
