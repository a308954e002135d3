"""The tutorial's commands, as they stand and in its order, in a copy whose demo is cut down to seconds; and the
README's everyday ones that need a run."""

import re

import pytest
from pdf_writer import write_pdf
from test_docs import AFTER_FETCH, ROOT, RUN, fenced, of
from test_dvc_commands import Repo, bare_environment, copy_working_tree, cut_down

PAGE = ROOT / "docs" / "tutorial.md"
STANDS_FOR = {"make repro": "dvc repro", "source .venv/bin/activate": "true"}  # the environment is there
ELSEWHERE = {  # commands of the page, and why they are not run here
    "colintern recipe internvl3_5-1b": "tests/test_docs.py; part 2 is run by tests/test_hub_pipeline.py, over loopback",
    "colintern recommend --base internvl3_5-1b --gpu a100-80gb": "tests/test_recommend.py",
    "colintern verify --base internvl3_5-1b": "tests/test_docs.py",
    'git commit -am "The 1B recipe"': "part 2",
    "dvc repro fetch-data": "part 2",
    "dvc repro verify": "part 2",
    "dvc repro train": "part 2",
    "dvc repro eval": "part 2",
    "python bench/debian_pdfs.py": "downloads Debian's manuals; PDFs are trained on in tests/test_own.py",
    "colintern recipe own-pdfs": "tests/test_docs.py; needs those manuals",
}
SAYS = {  # what the page quotes of a command's output, without its numbers
    "make repro": "model      ndcg@5 ndcg@10 rec@100",
    "colintern data": "demo (train): ",
    "colintern verify": "ok: every pattern matches, the head is trained, tower and projector are frozen",
    "colintern check-adapter experiments/colintern": "verdict: trained",
    "colintern compare main slower": "95 % interval",
    "colintern evaluate experiments/colintern --dim 128 64": "vectors bytes/page",
    'colintern search experiments/colintern ~/manuals "how is a package removed" --html found.html': "3 pages scored",
}
README = ("colintern mine", "colintern recommend", "dvc plots diff")


@pytest.fixture(scope="module")
def repo(tmp_path_factory) -> Repo:
    path, home = tmp_path_factory.mktemp("repo"), tmp_path_factory.mktemp("home")
    copy_working_tree(path)
    cut_down(path)
    shim = path / ".venv" / "bin" / "colintern"
    shim.parent.mkdir(parents=True)
    shim.write_text('#!/bin/sh\nexec python -m colintern.cli "$@"\n')
    shim.chmod(0o755)
    (home / "manuals").mkdir()
    write_pdf(home / "manuals" / "one.pdf", [["Removing a package"], ["Another page"], ["The last page"]])
    env = bare_environment(home)
    repo = Repo(path, env | {"PATH": f"{shim.parent}:{env['PATH']}", "HF_HUB_OFFLINE": "1"})
    repo.output("git init -q -b main")
    repo.commit()
    return repo


def lines() -> list[str]:
    return [line.partition("  #")[0].strip() for _, line in fenced(PAGE)]


def test_the_page_is_run_from_its_first_command_to_its_last(repo):
    assert set(STANDS_FOR) | set(ELSEWHERE) | set(SAYS) <= set(lines()), "a command that the page has no more"
    done = []
    for line in lines():
        if line in ELSEWHERE or line in done:
            continue
        said = repo.output(STANDS_FOR.get(line, line))
        assert SAYS.get(line, "") in said, f"{line}\n{said}"
        done.append(line)
        if line == "make repro":
            repo.commit()  # "Commit dvc.lock and the files in metrics/ before you compare with main"
    assert len(done) > 12 and (repo.path / "found.html").is_file() and (repo.path / "exported" / "README.md").is_file()


def test_the_everyday_commands_that_need_a_run(repo):
    text = (ROOT / "README.md").read_text()
    for command in README:
        assert re.search(rf"^{re.escape(command)} ?(\s*#|; |$)|; {re.escape(command)}\b", text, re.M), command
        assert repo.output(command)


def test_every_subcommand_that_a_page_names_is_run():
    run = [*RUN, *AFTER_FETCH, *README, *(line for line in lines() if line not in ELSEWHERE)]
    subcommands = {line.split()[1] for line in run if line.startswith("colintern ")}
    named = {command.words[1] for command in of("colintern")} - {"NAME"}
    assert named - subcommands == {"tune"}, "test_tune_dvc.py runs it, with a small space"
