"""The tutorial's commands, as they stand and in its order, in a copy whose demo is cut down to seconds; and the
README's everyday ones that need a run."""

import pytest
from pages import ROOT, documented, fenced
from pdf_writer import write_pdf
from test_dvc_commands import IDENTITY, Repo, bare_environment, copy_working_tree, cut_down, set_up

pytestmark = pytest.mark.integration
PAGE = ROOT / "docs" / "tutorial.md"
RUN = {  # the page's commands in its order, and what it quotes of their output, without numbers
    documented("make repro"): "model      ndcg@5 ndcg@10 rec@100",
    documented("source .venv/bin/activate"): "",
    documented("git add dvc.lock metrics plots"): "",
    documented('git commit -m "Baseline of this machine"'): "Baseline of this machine",
    documented("colintern data"): "demo (train): ",
    documented("colintern verify"): "ok: every pattern matches, the head is trained, tower and projector are frozen",
    documented("colintern doctor"): "",
    documented("colintern check-adapter experiments/colintern"): "verdict: trained",
    documented("dvc exp run -n slower -S lr=3e-3"): "",
    documented("make experiments"): "slower",
    documented("dvc metrics diff main"): "",
    documented("colintern compare main slower"): "95 % interval",
    documented(
        "colintern evaluate experiments/colintern --precision float16 int8 binary --rescore 0 20"
    ): "ndcg@10 change",
    documented("colintern report experiments/colintern"): "",
    documented('colintern search ~/manuals "how is a package removed" --html found.html'): ("3 pages scored"),
    documented("colintern export experiments/colintern --out exported"): "",
}
README = (
    documented("make experiments ARGS=-A"),
    documented("dvc exp branch slower slower-lr"),
    documented("colintern verify --json"),
    documented("colintern mine"),
    documented("colintern recommend"),
    documented("colintern evaluate experiments/colintern --pool-factor 1 2 4 --dim 128 64"),
    documented("colintern recommend --write"),
    documented("make env"),
    documented("mkdir -p logs"),
)


@pytest.fixture(scope="module")
def repo(tmp_path_factory, forked) -> Repo:
    path, home = tmp_path_factory.mktemp("repo"), tmp_path_factory.mktemp("home")
    copy_working_tree(path)
    cut_down(path)
    (home / "manuals").mkdir()
    write_pdf(home / "manuals" / "one.pdf", [["Removing a package"], ["Another page"], ["The last page"]])
    repo = set_up(Repo(path, bare_environment(home, forked) | {"HF_HUB_OFFLINE": "1"}))
    repo.output("git init -q -b main")
    repo.commit()
    return repo


def lines() -> list[str]:
    return [line.partition("  #")[0].strip() for _, line in fenced(PAGE)]


def test_the_page_is_run_from_its_first_command_to_its_last(repo):
    there = list(dict.fromkeys(line for line in lines() if line in RUN))
    assert there == list(RUN), "the page has them in another order; what else it has, others run (test_docs.py)"
    for line, quoted in RUN.items():
        said = repo.output(line.replace("source ", ". "), **(IDENTITY if line.startswith("git commit") else {}))
        assert quoted in said, f"{line}\n{said}"
        if line == "make experiments":
            assert max(map(len, said.splitlines())) <= 80, said
            [header] = [row.split() for row in said.splitlines() if "Experiment" in row]
            assert header == ["Experiment", "dev_ndcg_at_5", "ndcg_at_5", "lr"], said
        if line.startswith("dvc metrics"):
            assert max(map(len, said.splitlines())) <= 80, said
        if line == "make repro":
            assert said.rstrip().endswith("source .venv/bin/activate") and "  git add dvc.lock metrics plots" in said
    assert (repo.path / "found.html").is_file() and (repo.path / "exported" / "README.md").is_file()


@pytest.mark.slow  # six trainings in one command
@pytest.mark.timeout(2400)
def test_groups_of_seeds_are_queued_and_compared(repo, monkeypatch):
    monkeypatch.setattr("test_dvc_commands.TIMEOUT", 2000)
    if not (repo.path / "experiments" / "colintern").is_dir():
        repo.output("dvc repro -q")
    repo.commit()
    for command in (
        documented("dvc exp run --queue -n slower -S 'seed=0,1,2' -S lr=3e-3"),
        documented("dvc exp run --queue -n same -S 'seed=0,1,2'"),
        documented("dvc exp run --run-all"),
    ):
        repo.output(command, **IDENTITY)
    out = repo.output(documented("colintern compare 'same-*' 'slower-*'"))
    assert "a: same-* (3 seeds: same-1, same-2, same-3)" in out and "\nlr: 0.006 -> 0.003" in out, out
    assert "seeds: 3 of a, 3 of b; intervals and p cover queries and seeds" in out and "spread over seeds" in out


def test_other_commands_that_need_a_run(repo):
    for command in README:
        repo.output(command)
