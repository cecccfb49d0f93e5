"""The run before its first step."""

from loop.plan import main, plot


def test_the_command(config_file, capsys):
    main(["--config", str(config_file)])
    out = capsys.readouterr().out
    assert "4 rows x 1,024 = 4,096 tokens" in out and "learning rate over" in out and "40 examples" in out


def test_the_plotted_curve_falls():
    rows = plot([1.0, 0.75, 0.5, 0.25, 0.01], height=4).splitlines()
    assert [row.split("|")[1].count("█") for row in rows] == [1, 2, 3, 4]
