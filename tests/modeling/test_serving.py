"""An export is served by `transformers serve` and answers the official OpenAI client, whole and streamed."""

import importlib.util
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest
import torch

from data_scripts.train_tokenizer import train_tokenizer
from modeling_deepseek_r1 import DeepSeekR1Config, DeepSeekR1ForCausalLM
from modeling_deepseek_r1.checkpoint import export
from tests.recipes.tiny_run import SIZES

NEEDED = ("fastapi", "uvicorn", "openai")
ABSENT = [name for name in NEEDED if importlib.util.find_spec(name) is None]
pytestmark = pytest.mark.skipif(bool(ABSENT), reason=f"not installed: {', '.join(ABSENT)} (pip install -e '.[test]')")

QUESTION = [{"role": "user", "content": "What is 2 + 2?"}]
TEXTS = ["Two and two make four.", "It is 4, as everybody knows.", QUESTION[0]["content"]]
NEW_TOKENS = 40
START_SECONDS = 120


def random_model(tokenizer):
    """A tiny model with random weights that writes ASCII: its next token hangs on every weight and field."""
    torch.manual_seed(0)
    ids = {"pad_token_id": tokenizer.pad_token_id, "bos_token_id": tokenizer.bos_token_id,
           "eos_token_id": tokenizer.eos_token_id}  # fmt: skip
    sizes = {**SIZES, "vocab_size": len(tokenizer), "max_position_embeddings": 256, "initializer_range": 0.2}
    model = DeepSeekR1ForCausalLM(DeepSeekR1Config(**sizes, **ids))
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    others = [i for i, token in enumerate(tokens) if token.startswith("<") or not tokenizer.decode([i]).isascii()]
    model.lm_head.weight.data[others] = 0.0  # half a character, or a mark: shown in other ways when streamed
    return model.eval()


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """(our model, its tokenizer, the folder of its export)"""
    folder = tmp_path_factory.mktemp("models")
    tokenizer = train_tokenizer(TEXTS * 3, vocab_size=400)
    model = random_model(tokenizer)
    model.save_pretrained(folder / "ours")
    tokenizer.save_pretrained(folder / "ours")
    export(folder / "ours", folder / "plain")
    return model, tokenizer, folder / "plain"


@pytest.fixture(scope="module")
def server(exported, tmp_path_factory):
    """Address of a `transformers serve` process with the export, alone and without network."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    home = tmp_path_factory.mktemp("home")
    (home / "hub").mkdir()  # /v1/models lists the cache and fails where there is none
    environment = {**os.environ, "HF_HOME": str(home), "HF_HUB_CACHE": str(home / "hub"), "HF_HUB_OFFLINE": "1",
                   "PYTHONPATH": "", "OMP_NUM_THREADS": "1"}  # fmt: skip
    command = [sys.executable, "-c", "from transformers.cli.transformers import main; main()", "serve",
               str(exported[2]), "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]  # fmt: skip
    log = home / "log.txt"
    with log.open("wb") as stream:
        process = subprocess.Popen(command, cwd=home, env=environment, stdout=stream, stderr=subprocess.STDOUT)
    address = f"http://127.0.0.1:{port}"
    try:
        wait_until_healthy(address, process, log)
        yield address
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def wait_until_healthy(address, process, log):
    last = time.monotonic() + START_SECONDS
    while time.monotonic() < last:
        assert process.poll() is None, f"the server ended with {process.returncode}: {log.read_text()[-3000:]}"
        try:
            with urllib.request.urlopen(address + "/health", timeout=5) as reply:
                assert reply.status == 200
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    pytest.fail(f"no answer after {START_SECONDS} s: {log.read_text()[-3000:]}")


def test_openai_client_gets_the_greedy_answer_whole_and_streamed(exported, server):
    from openai import OpenAI

    model, tokenizer, folder = exported
    inputs = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    ids = model.generate(**inputs, do_sample=False, max_new_tokens=NEW_TOKENS)[0, inputs["input_ids"].shape[1] :]
    ours = tokenizer.decode(ids, skip_special_tokens=True)
    assert len(set(ids.tolist())) > 10  # not one token over and over, which a wrong model would give too

    client = OpenAI(base_url=server + "/v1", api_key="none", timeout=60, max_retries=0)
    request = {"model": str(folder), "messages": QUESTION, "temperature": 0, "max_tokens": NEW_TOKENS}
    reply = client.chat.completions.create(**request)
    assert reply.choices[0].message.content == ours
    assert reply.choices[0].finish_reason == "length"
    assert reply.usage.prompt_tokens == inputs["input_ids"].shape[1] and reply.usage.completion_tokens == NEW_TOKENS

    chunks = list(client.chat.completions.create(**request, stream=True))
    pieces = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices and chunk.choices[0].delta.content]
    assert len(pieces) > 5 and "".join(pieces) == ours
    assert chunks[-1].choices[0].finish_reason == "length"
    assert isinstance(client.models.list().data, list)
