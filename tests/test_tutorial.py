"""The tutorial's commands, as they stand and in its order, in a copy whose demo is cut down to seconds; and the
README's everyday ones that need a run."""

import pytest
from pages import ROOT, documented, fenced
from pdf_writer import write_pdf
from test_dvc_commands import Repo, bare_environment, copy_working_tree, cut_down, set_up

PAGE = ROOT / "docs" / "tutorial.md"
RUN = {  # the page's commands in its order, and what it quotes of their output, without numbers
    documented("make repro"): "model      ndcg@5 ndcg@10 rec@100",
    documented("source .venv/bin/activate"): "",
    documented("colintern data"): "demo (train): ",
    documented("colintern verify"): "ok: every pattern matches, the head is trained, tower and projector are frozen",
    documented("colintern doctor"): "",
    documented("colintern check-adapter experiments/colintern"): "verdict: trained",
    documented("dvc exp run -n slower -S lr=3e-3"): "",
    documented('dvc exp show --only-changed --drop "health|demo|experiments|Created|State|Executor"'): "slower",
    documented("dvc metrics diff main"): "",
    documented("colintern compare main slower"): "95 % interval",
    documented("colintern evaluate experiments/colintern --dim 128 64"): "vectors bytes/page",
    documented("colintern report experiments/colintern"): "",
    documented('colintern search experiments/colintern ~/manuals "how is a package removed" --html found.html'): (
        "3 pages scored"
    ),
    documented("colintern export experiments/colintern --out exported"): "",
}
README = (
    documented("colintern mine"),
    documented("colintern recommend"),
    documented("colintern evaluate experiments/colintern --pool-factor 1 2 4 --dim 128 64"),
    documented("colintern recommend --write"),
    documented("make env"),
    documented("mkdir -p logs"),
)


@pytest.fixture(scope="module")
def repo(tmp_path_factory) -> Repo:
    path, home = tmp_path_factory.mktemp("repo"), tmp_path_factory.mktemp("home")
    copy_working_tree(path)
    cut_down(path)
    (home / "manuals").mkdir()
    write_pdf(home / "manuals" / "one.pdf", [["Removing a package"], ["Another page"], ["The last page"]])
    repo = set_up(Repo(path, bare_environment(home) | {"HF_HUB_OFFLINE": "1"}))
    repo.output("git init -q -b main")
    repo.commit()
    return repo


def lines() -> list[str]:
    return [line.partition("  #")[0].strip() for _, line in fenced(PAGE)]


def test_the_page_is_run_from_its_first_command_to_its_last(repo):
    there = list(dict.fromkeys(line for line in lines() if line in RUN))
    assert there == list(RUN), "the page has them in another order; what else it has, others run (test_docs.py)"
    for line, quoted in RUN.items():
        said = repo.output(line.replace("source ", ". "))
        assert quoted in said, f"{line}\n{said}"
        if line.startswith("dvc exp show"):  # "leaves what fits 80 columns"
            assert max(map(len, said.splitlines())) <= 80, said
        if line == "make repro":
            repo.commit()  # "Commit dvc.lock and the files in metrics/ before you compare with main"
    assert (repo.path / "found.html").is_file() and (repo.path / "exported" / "README.md").is_file()


def test_other_commands_that_need_a_run(repo):
    for command in README:
        repo.output(command)
