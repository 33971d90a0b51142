"""Files and folders are written whole or not at all, through links, and never over what is somebody else's."""

import os

import pytest

from mosa_fast.files import write_folder_atomically, write_text


def writer(text):
    def write(path):
        path.mkdir()
        (path / "config.json").write_text(text)
        (path / "weights").write_text(text)

    return write


def test_a_folder_is_replaced_only_by_one_that_has_all_its_entries(tmp_path):
    out = tmp_path / "out"
    write_folder_atomically(out, writer("old"))
    write_folder_atomically(out, writer("new"))
    assert (out / "weights").read_text() == "new"
    (out / ".git").mkdir()
    (out / "README.md").write_text("mine")
    with pytest.raises(ValueError, match=r"out is not replaced: .* would be lost \(\.git, README\.md\)$"):
        write_folder_atomically(out, writer("newer"))
    assert sorted(os.listdir(out)) == [".git", "README.md", "config.json", "weights"]
    assert (out / "weights").read_text() == "new"
    assert os.listdir(tmp_path) == ["out"]


def test_a_folder_that_stands_where_a_file_would_be_is_not_lost(tmp_path):
    (tmp_path / "out" / "weights").mkdir(parents=True)
    (tmp_path / "out" / "weights" / "mine").write_text("mine")
    with pytest.raises(ValueError, match=r"would be lost \(weights\)"):
        write_folder_atomically(tmp_path / "out", writer("new"))
    assert (tmp_path / "out" / "weights" / "mine").read_text() == "mine"


def test_a_link_to_a_folder_stays_a_link_and_what_it_leads_to_is_replaced(tmp_path):
    write_folder_atomically(tmp_path / "disk" / "target", writer("old"))
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "disk" / "target")
    write_folder_atomically(link, writer("new"))
    assert link.is_symlink()
    assert (tmp_path / "disk" / "target" / "weights").read_text() == "new"
    assert (os.listdir(tmp_path / "disk"), sorted(os.listdir(tmp_path))) == (["target"], ["disk", "link"])


def test_a_text_is_utf_8_whatever_the_locale_and_replaces_the_earlier_one_as_a_whole(tmp_path):
    path = tmp_path / "new" / "text"
    write_text(path, "a longer text")
    write_text(path, "Möwe")
    assert path.read_bytes() == "Möwe".encode()
    assert os.listdir(path.parent) == ["text"]
