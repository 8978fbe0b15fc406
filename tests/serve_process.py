"""A tiny chat model, and processes of `tierkv serve`."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from child_process import ENVIRONMENT

__all__ = [
    "ServerProcess",
    "Start",
    "descriptors_of",
    "resident_bytes",
    "running_server",
    "threads_of",
    "write_model",
]

TEMPLATE = (
    "{% if tools %}<|im_start|>system\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}"
    "Answer <tool_call>{...}</tool_call> to call one.<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "{% for call in message.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass
class ServerProcess:
    """A running `tierkv serve`."""

    process: subprocess.Popen[str]
    url: str
    log: Path

    @property
    def pid(self) -> int:
        return self.process.pid

    def client(self, **options: Any) -> Any:
        """Return the official client, without retries."""
        import openai

        options = {"api_key": "none", "max_retries": 0, "timeout": 60.0, **options}
        return openai.OpenAI(base_url=f"{self.url}/v1", **options)

    def stop(self, timeout_s: float = 60.0) -> float:
        """Send SIGTERM; return the seconds until the process is gone. 0 where the machine has no time to spare."""
        is_busy = os.getloadavg()[0] > 2 * (os.cpu_count() or 1)
        started = time.monotonic()
        self.process.terminate()
        self.process.wait(timeout_s)
        return 0.0 if is_busy else time.monotonic() - started


Start = Callable[..., ServerProcess]


def write_model(path: Path) -> None:
    """Write a tiny random chat model whose tokens are the ASCII characters, so that text and tokens are one."""
    import torch
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = {character: at for at, character in enumerate([chr(code) for code in range(33, 127)] + ["Ġ", "Ċ"])}
    backend = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = TEMPLATE
    config = transformers.Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=64,
        max_position_embeddings=4096,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=tokenizer.convert_tokens_to_ids("<|im_end|>"),
        pad_token_id=tokenizer.convert_tokens_to_ids("<|endoftext|>"),
        dtype="float32",
    )
    torch.manual_seed(4)
    model = transformers.Qwen3ForCausalLM(config)
    with torch.no_grad():
        model.lm_head.weight[tokenizer.all_special_ids] = 0  # so that no answer ends early by chance
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)


@contextmanager
def running_server(model: Path, folder: Path, *arguments: str, **environment: str) -> Iterator[ServerProcess]:
    """Run `tierkv serve` on a free port until the block ends; its store lies in the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / f"log-{len(list(folder.glob('log-*')))}"
    command = [sys.executable, "-m", "tierkv", "serve", str(model), "--port", "0", "--store", str(folder / "store")]
    command += ["--block-size", "16", "--hot", "32M", "--warm", "16M", "--cold", "256M", "--min-free", "0", *arguments]
    with (
        log.open("w") as output,
        subprocess.Popen(
            command,
            env={**ENVIRONMENT, "OMP_NUM_THREADS": "1", **environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=output,
            text=True,
        ) as process,
    ):
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            found = re.search(r"at (http://\S+)", line)
            assert found, line + log.read_text()
            yield ServerProcess(process, found[1], log)
        finally:
            process.kill()
            process.wait()


def descriptors_of(pid: int) -> int:
    """Count the open files of a process."""
    return len(os.listdir(f"/proc/{pid}/fd"))


def threads_of(pid: int) -> int:
    """Count the threads of a process."""
    return len(os.listdir(f"/proc/{pid}/task"))


def resident_bytes(pid: int) -> int:
    """Return the memory of a process."""
    text = Path(f"/proc/{pid}/statm").read_text()
    return int(text.split()[1]) * os.sysconf("SC_PAGE_SIZE")
