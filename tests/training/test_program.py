import pytest

from npnorm import SOLO, Config
from npnorm.training import language_reference
from npnorm.training.program import arguments, train_on_text


def run(capsys, *argv):
    settings = arguments(SOLO, "A test.", argv)
    loss = train_on_text(SOLO, Config.modern, settings)
    return loss, capsys.readouterr()


def test_another_text_is_trained_on_and_reported(capsys, tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("to be or not to be, that is the question; " * 50, encoding="utf-8")
    small = "--width 16 --depth 1 --heads 2 --context 16 --rows 4 --lr 0.01 --sample 20".split()
    loss, printed = run(capsys, "--text", str(file), "--steps", "60", *small)
    assert "text.txt: 2,100 characters, 15 distinct" in printed.out
    assert f"held-out loss {loss:.3f}" in printed.out
    assert len(printed.out.split("first held-out character\n")[1]) == 22  # the first, 20 drawn, and the end of the line
    assert loss < 1.5
    assert "loss=" in printed.err
    assert "tokens/s" in printed.err


def test_without_a_text_the_language_reference_is_trained_on(capsys):
    small = "--steps 1 --width 16 --depth 1 --heads 2 --context 64 --rows 64 --sample 0".split()
    _, printed = run(capsys, *small)
    assert f"text    the Python language reference: {len(language_reference()):,} characters, " in printed.out


def test_a_text_that_is_too_short_is_an_error(capsys, tmp_path):
    (tmp_path / "short.txt").write_text("short")
    with pytest.raises(SystemExit, match="error: The text has 5 characters"):
        run(capsys, "--text", str(tmp_path / "short.txt"))
    with pytest.raises(SystemExit, match=r"error: .*No such file.*none\.txt"):
        run(capsys, "--text", str(tmp_path / "none.txt"))


def test_heads_that_do_not_fit_are_an_error(capsys):
    with pytest.raises(SystemExit, match="error: Config: 3 heads cannot share 128 features"):
        run(capsys, "--heads", "3")


@pytest.mark.parametrize(
    "wrong", ["--steps 0", "--steps 1.5", "--rows x", "--no-such", "--lr=-1", "--lr nan", "--seed=-1", "--sample=-3"]
)
def test_a_wrong_setting_leaves_with_usage(capsys, wrong):
    with pytest.raises(SystemExit) as leave:
        arguments(SOLO, "A test.", wrong.split())
    assert leave.value.code == 2
    assert "usage" in capsys.readouterr().err
