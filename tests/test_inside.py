"""Names that files give stay in their folder."""

from pathlib import Path

import pytest

from ringjax.inside import inside


@pytest.mark.parametrize("name", ["a.png", "sub/a.png", "é 漢.png", "..a", "a..b/c", "x" * 255])
def test_names_of_files(name):
    assert inside("folder", name) == Path("folder") / name


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        "../a",
        "a/../../b",
        "/etc/passwd",
        "a/..",
        "..\\a",
        "\0",
        "a\0b",
        "\ud800",
        "x" * 256,
        "a/" * 600,
    ],
)
def test_no_names_of_files_in_a_folder(name):
    with pytest.raises(
        ValueError, match="is no name of a file|leads out of the folder folder|longer than a file's name"
    ):
        inside("folder", name)


@pytest.mark.parametrize("name", ["a/b", "./a", "a/", ".."])
def test_of_the_folder_itself(name):
    with pytest.raises(ValueError, match="is not a file of the folder"):
        inside("folder", name, levels=False)
    assert inside("folder", "a.b", levels=False) == Path("folder/a.b")
