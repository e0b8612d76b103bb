"""Data sets of the Hub, from a stand-in for huggingface_hub: what is listed, fetched and refused."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from moejax.config import Domain, UserError
from moejax.data import hub_text, sources

FILES = {"README.md": "about", "train/a.jsonl": '{"text": "one"}\n', "train/b.jsonl": '{"text": "two"}\n', ".gitattributes": "x"}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """org/set with four files; `fetched` lists what was asked for."""
    fetched: list[str] = []

    class Api:
        def dataset_info(self, repository, files_metadata):
            if repository != "org/set":
                raise ConnectionError("no route to host\nand more of it")
            siblings = [SimpleNamespace(rfilename=name, size=len(text), blob_id=f"hash of {name}") for name, text in FILES.items()]
            return SimpleNamespace(sha="c0ffee", siblings=siblings)

        def hf_hub_download(self, repository, name, repo_type, revision):
            assert (repository, repo_type, revision) == ("org/set", "dataset", "c0ffee")
            fetched.append(name)
            (tmp_path / "file").write_text(FILES[name])
            return str(tmp_path / "file")

    monkeypatch.setattr(hub_text, "_api", Api)
    return fetched


@pytest.mark.parametrize(
    "address, texts",
    [
        ("hf://datasets/org/set", {"about", "one", "two"}), ("hf://datasets/org/set/train", {"one", "two"}),
        ("hf://datasets/org/set/train/b*", {"two"}), ("hf://datasets/org/set/*.md", {"about"}),
    ],
)  # fmt: skip
def test_files_are_fetched_as_they_are_read(hub, address, texts):
    domain = Domain("text", address)
    documents = sources.read_documents(domain, 10**6, 0)
    next(documents)
    assert len(hub) == 1
    assert {document.text for document in sources.read_documents(domain, 10**6, 0)} == texts


def test_the_description_is_that_of_the_contents(hub, monkeypatch):
    domain = Domain("text", "hf://datasets/org/set/train")
    before = sources.describe_source(domain)
    assert sources.describe_source(domain) == before and before["files"] == 2 and hub == []
    monkeypatch.setitem(FILES, "train/a.jsonl", '{"text": "changed"}\n')
    assert sources.describe_source(domain) != before


@pytest.mark.parametrize(
    "address, message",
    [
        ("hf://models/org/set", "is no data set of the Hub; expected hf://datasets/OWNER/NAME"),
        ("hf://datasets/org", "is no data set of the Hub"),
        ("hf://datasets/org/set/none*", r"no file of the data set org/set matches 'none\*'"),
        ("hf://datasets/org/other", r"the Hub does not answer \(no route to host\); connect to the network"),
    ],
)
def test_what_is_not_there_is_one_line(hub, address, message):
    with pytest.raises(UserError, match=message) as caught:
        sources.list_files(Domain("text", address))
    assert "\n" not in str(caught.value)


def test_without_a_network_the_hub_is_said_not_to_answer(monkeypatch):
    """The real library, pointed at a port where nobody listens."""
    import huggingface_hub

    monkeypatch.setattr(hub_text, "_api", lambda: huggingface_hub.HfApi(endpoint="http://127.0.0.1:9"))
    with pytest.raises(UserError, match="the Hub does not answer"):
        hub_text.list_hub_files("hf://datasets/org/set")
