import dataclasses
import math
import re
from types import SimpleNamespace

import pytest
import torch
from pages import documented, words

from bench import gpu, loss, scoring

pytestmark = pytest.mark.integration


def test_the_gpu_table_is_printed_whole_in_its_tiny_form(capsys):
    gpu.main([*words(documented("python -m bench.gpu"))[3:], "--tiny"])
    out = capsys.readouterr().out
    rows = re.findall(r"(?m)^ +(\d+) +(\d) of 2 +(0\.[01]) +off +(\d+\.\d{3}) ", out)
    settings = {(int(micro), int(layers)) for micro, layers, dropout, _ in rows if dropout == "0.1"}
    assert settings == {(2, 0), (2, 2), (4, 0), (4, 1), (4, 2)}, "of the whole batch also with some layers recomputed"
    assert len(rows) == 2 * (len(settings) + 1), "two page sizes, each ending with a row without dropout"
    assert "ok  gradient" in out and "ok  loss" in out
    assert re.search(r"\nRESULT seconds_2_tiles=\S+ seconds_1_tiles=\S+ roofline_share=unknown gradient_error=", out)


def test_compiled_rows_recompute_fewer_layers_until_it_does_not_fit(monkeypatch, capsys):
    """As on a GPU where keeping all activations does not fit: of the uncompiled rows the fastest recomputes both."""
    compiled, micro = [], []

    def measure(engine, batch):
        again = sum(layer.gradient_checkpointing for layer in engine.base.language_model.layers)
        if len(compiled) > len(micro):
            micro.append(again)
        return (math.nan, math.inf) if again == 0 else (1.0 / again, 1.0)

    monkeypatch.setattr(gpu, "TINY", dataclasses.replace(gpu.TINY, compile=True, tiles=(2,)))
    monkeypatch.setattr(gpu, "compile_layers", lambda model: compiled.append(model))
    monkeypatch.setattr(gpu, "measure", measure)
    gpu.main(["--tiny"])
    rows = re.findall(r"(?m) (\d) of 2 +(0\.[01]) +on ", capsys.readouterr().out)
    assert micro == [2, 1, 0, 2] and rows == [("2", "0.0"), ("1", "0.0"), ("0", "0.0"), ("2", "0.1")]


def test_a_compiler_that_fails_costs_the_compiled_rows_alone(monkeypatch, capsys):
    """As Triton where there is no C compiler, in the first step: the other page size is measured, and the end said."""
    compiled = []

    def measure(engine, batch):
        if compiled:
            compiled.clear()
            raise RuntimeError("Failed to find C compiler.\nPlease specify")
        return 1.0, 1.0

    monkeypatch.setattr(gpu, "TINY", dataclasses.replace(gpu.TINY, compile=True))
    monkeypatch.setattr(gpu, "compile_layers", compiled.append)
    monkeypatch.setattr(gpu, "measure", measure)
    gpu.main(["--tiny"])
    out = capsys.readouterr().out
    assert out.count(" on      NO compiled: RuntimeError: Failed to find C compiler.\n") == 2
    assert "RESULT seconds_2_tiles=1.000 seconds_1_tiles=1.000 " in out


def test_pages_are_pinned_as_by_the_trainers_loader(monkeypatch):
    pinned = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: pinned.append(tuple(self.shape)) or self)
    text = SimpleNamespace(hidden_size=8)
    base = SimpleNamespace(dtype=torch.bfloat16, config=SimpleNamespace(get_text_config=lambda: text))
    pages = lambda items: {"features": torch.cat([item["pages"][0]["features"] for item in items])}  # noqa: E731
    trainer, processor = SimpleNamespace(data_collator=pages), SimpleNamespace(image_seq_length=4)
    gpu.Engine.batch(SimpleNamespace(base=base, trainer=trainer, processor=processor), [2, 1])
    assert pinned == [(3, 4, 8)]


@pytest.mark.parametrize("broken", ["gradient_error", "loss_error"])
def test_a_failed_check_is_told_by_the_exit_code(monkeypatch, capsys, broken):
    monkeypatch.setattr(gpu, "gradient_error", lambda *_: 1.0 if broken == "gradient_error" else 0.0)
    monkeypatch.setattr(gpu, "loss_error", lambda *_: 1.0 if broken == "loss_error" else 0.0)
    monkeypatch.setattr(gpu, "MOST_SECONDS", -1)  # no rows
    with pytest.raises(SystemExit) as stop:
        gpu.main(["--tiny"])
    out = capsys.readouterr().out
    assert stop.value.code == 1 and "NO " in out and out.count("5 rows left out") == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to be measured")
def test_without_a_gpu_it_says_so(capsys):
    with pytest.raises(SystemExit) as stop:
        gpu.main([])
    assert stop.value.code == 2
    assert "no CUDA device" in capsys.readouterr().err


def test_the_losses_that_are_timed_agree():
    loss.agree(*loss.embeddings(4, 6, 20, 16))
    plain, ours = (loss.in_fresh_process(name, [8, 30, 400, 64], threads=1) for name in ("plain einsum", "ours"))
    assert plain > ours


@pytest.fixture
def threads_put_back():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("broken", [False, True])
def test_scorers_are_compared_on_three_kinds_of_pages(monkeypatch, capsys, threads_put_back, broken):
    if broken:
        right = scoring.maxsim_scores
        monkeypatch.setattr(scoring, "maxsim_scores", lambda *items, device: -right(*items, device=device))
    with pytest.raises(SystemExit) as stop:
        sizes = "--queries 3 --pages 4 --rounds 1 --streamed 2 3 4"
        scoring.main([*words(documented("python -m bench.scoring"))[3:], *sizes.split()])
    out = capsys.readouterr().out
    rows = re.findall(r"(?m)^(\S.+?) +\d+\.\d{3} +\d+\.\d\dx  (same|another) ranking$", out)
    assert rows == [
        (name, "another" if broken and name == scoring.OURS else "same")
        for _ in scoring.SHAPES
        for name in scoring.scorers("cpu")
    ]
    assert stop.value.code == broken
    number = r"=\d+\.\d\d "
    assert re.search(f"\nRESULT {''.join(key + number for key in scoring.SHAPES)}same_ranking={not broken} ", out)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to be measured")
def test_scorers_on_a_gpu_that_is_not_there(capsys):
    with pytest.raises(SystemExit) as stop:
        scoring.main(["--device", "cuda"])
    assert stop.value.code == 2
    assert "--device: 'cuda' is not valid" in capsys.readouterr().err
