"""Talk to a model in the terminal: its reasoning is dimmed and its answer plain, both as they are written.

    python recipes/chat.py --model_name_or_path runs/sft [--temperature 0.6 --system "Be brief." --adapter runs/lora]
    echo "What is 2 + 2?" | python recipes/chat.py --model_name_or_path runs/sft        # one line, one question

Any causal language model with a chat template will do; `--zero` gives a base model R1-Zero's prompt. Past reasoning
is left out by the template, the oldest turns when the context is full. (`transformers chat` needs a server,
and `transformers serve` loads none but library classes.)

Commands: /help /reset /system TEXT /retry /save FILE /quit. Ctrl-C stops an answer and keeps what was said. A line that
ends with a backslash goes on in the next one; lines between two lines of three double quotes are one message.
"""

import argparse
import json
import os
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

if __package__ in (None, ""):  # launched as a script: recipes/ is first on the path and shadows packages
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from jinja2 import TemplateError
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
    set_seed,
)

import modeling_deepseek_r1  # noqa: F401  (registers the model type deepseek_r1)
from recipes.chat_format import CLOSE, OPEN, ReasoningStream, set_chat_template
from recipes.conversations import drop_oldest_turn

DIM, PLAIN = "\x1b[2m", "\x1b[0m"


def parse_arguments(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", required=True, help="folder or Hub name of a causal language model")
    parser.add_argument("--adapter", help="folder or Hub name of a PEFT adapter to put on it")
    parser.add_argument("--system", help="system prompt")
    parser.add_argument("--zero", action="store_true", help="R1-Zero's prompt, for base models")
    parser.add_argument("--temperature", type=float, default=0.6, help="0: always the likeliest token (default 0.6)")
    parser.add_argument("--top_p", type=float, default=0.95, help="share of the distribution kept (default 0.95)")
    parser.add_argument("--max_new_tokens", type=int, default=512, help="longest answer, reasoning included (512)")
    parser.add_argument("--seed", type=int, help="for answers that can be repeated")
    parser.add_argument("--dtype", help="default: float32 on a CPU, else bfloat16")
    parser.add_argument("--use_cpu", action="store_true", help="stay on the CPU although there is a GPU")
    parser.add_argument("--trust_remote_code", action="store_true", help="run the code that a model folder brings")
    args = parser.parse_args(argv)
    for name, wrong, allowed in (("temperature", args.temperature < 0, "0 or positive"),
                                 ("top_p", not 0 < args.top_p <= 1, "in (0, 1]"),
                                 ("max_new_tokens", args.max_new_tokens < 1, "at least 1"),
                                 ("dtype", args.dtype not in (None, "float32", "bfloat16", "float16"),
                                  "float32, bfloat16 or float16")):  # fmt: skip
        if wrong:
            raise ValueError(f"{name}={getattr(args, name)} must be {allowed}")
    return args


def load(args):
    """(model, tokenizer), ready to generate."""
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() and not args.use_cpu else None
    device = device or torch.device("cpu")
    dtype = getattr(torch, args.dtype or ("float32" if device.type == "cpu" else "bfloat16"))
    tokenizer = AutoTokenizer.from_pretrained(args.model_name_or_path, trust_remote_code=args.trust_remote_code)
    if args.zero:
        set_chat_template(tokenizer, "deepseek_r1_zero")
    if not tokenizer.chat_template:
        raise ValueError(f"the tokenizer of {args.model_name_or_path} has no chat template: the model was not trained "
                         "to chat; --zero asks a base model with R1-Zero's prompt")
    model = AutoModelForCausalLM.from_pretrained(args.model_name_or_path, dtype=dtype,
                                                 trust_remote_code=args.trust_remote_code)
    if args.adapter:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, args.adapter)
    return model.to(device).eval(), tokenizer


class StopWhenAsked(StoppingCriteria):
    def __init__(self, asked):
        self.asked = asked

    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((len(input_ids),), self.asked.is_set(), device=input_ids.device, dtype=torch.bool)


@dataclass
class Reply:
    """What came of one question: the text to keep, and why it ended (end, length, stopped)."""

    text: str
    end: str


@dataclass
class Prompt:
    """Messages that fit, as text and token ids, and how many turns were left out for that."""

    messages: list
    text: str
    ids: list
    dropped: int


class ChatModel:
    """Prompts within the context, and answers piece by piece from a thread that can be stopped.

    Every turn reads the conversation anew. The template drops earlier reasoning, so that little of a cache would hold,
    and a DeepSeek-R1 model decodes by its fast path only in a cache of its own (docs/generation.md).
    """

    def __init__(self, model, tokenizer, args):
        self.model, self.tokenizer, self.args = model, tokenizer, args
        self.context = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 2**31
        ends = [model.generation_config.eos_token_id, tokenizer.eos_token_id]
        ends = {i for end in ends for i in (end if isinstance(end, list) else [end])} - {None}
        sampling = {"temperature": args.temperature, "top_p": args.top_p, "top_k": 0} if args.temperature else {
            "temperature": None, "top_p": None, "top_k": None}
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else min(ends, default=0)
        self.settings = {"do_sample": args.temperature > 0, "pad_token_id": pad, **sampling}
        self.settings |= {"eos_token_id": sorted(ends)} if ends else {}
        if args.zero:  # a base model goes on with the User's part
            self.settings |= {"stop_strings": ["</answer>"], "tokenizer": tokenizer}

    def prompt(self, messages):
        """The Prompt of a conversation: its oldest turns go until an answer fits, or half a context of answer.

        Raises:
            ValueError: if the last question alone fills the context.
        """
        room, dropped = min(self.args.max_new_tokens, self.context // 2), 0
        while True:
            text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]  # the template writes <bos> itself
            shorter = drop_oldest_turn(messages)
            if len(ids) + room <= self.context or shorter is None:
                break
            messages, dropped = shorter, dropped + 1
        if len(ids) >= self.context:
            raise ValueError(f"the question makes {len(ids)} tokens and the context holds {self.context}: shorten it "
                             "or the system prompt")
        return Prompt(messages, text, ids, dropped)

    def reply(self, prompt, show):
        """The Reply to a prompt; `show(kind, piece)` gets reasoning and answer as they come.

        KeyboardInterrupt ends the answer and is not passed on.
        """
        budget = min(self.args.max_new_tokens, self.context - len(prompt.ids))
        opened = prompt.text.rstrip().endswith(OPEN)
        stream, asked, pieces, outcome = ReasoningStream(opened), threading.Event(), [], {}
        streamer = TextIteratorStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        ids = torch.tensor([prompt.ids], device=self.model.device)

        def work():
            try:
                outcome["ids"] = self.model.generate(
                    input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=budget, streamer=streamer,
                    stopping_criteria=StoppingCriteriaList([StopWhenAsked(asked)]), **self.settings)
            except Exception as error:  # noqa: BLE001  (raised again below, where it is seen)
                outcome["error"] = error
                streamer.end()
        worker = threading.Thread(target=work, daemon=True)
        worker.start()
        try:
            for piece in streamer:
                pieces.append(piece)
                for kind, part in stream.feed(piece):
                    show(kind, part)
        except KeyboardInterrupt:
            asked.set()
            pieces += list(streamer)  # at most one more token
        worker.join()
        for kind, part in stream.close():
            show(kind, part)
        if "error" in outcome:
            raise outcome["error"]
        said = "".join(pieces)
        new = outcome["ids"][0, len(prompt.ids):].tolist()
        ended = new[-1] in self.settings.get("eos_token_id", ()) or any(
            text in said for text in self.settings.get("stop_strings", ()))
        end = "end" if ended else "stopped" if asked.is_set() else "length"
        said = f"{OPEN}\n{said}" if opened else said
        if OPEN in said and CLOSE not in said:  # cut off while reasoning: closed, so that the template can drop it
            said = f"{said.rstrip()}\n{CLOSE}\n\n"
        return Reply(said, end)


class Screen:
    """Writes pieces; reasoning is dimmed on a terminal, and in tags where there is no colour."""

    def __init__(self, out, color):
        self.out, self.color, self.kind = out, color, None

    def show(self, kind, text):
        if kind == "notice":
            self.end()
            self.out.write(f"{DIM}[{text}]{PLAIN}\n" if self.color else f"[{text}]\n")
        else:
            if kind != self.kind:
                self._turn_to(kind)
            self.out.write(text)
        self.out.flush()

    def _turn_to(self, kind):
        dim, tag = (DIM, f"{OPEN}\n") if kind == "reasoning" else (PLAIN, "")
        if self.kind == "reasoning":
            self.out.write("\n\n" if self.color else f"\n{CLOSE}\n\n")
        self.out.write(dim if self.color else tag)
        self.kind = kind

    def end(self):
        """The next piece begins a line of its own."""
        if self.kind is not None:
            self.out.write(f"{PLAIN}\n" if self.color else f"\n{CLOSE}\n" if self.kind == "reasoning" else "\n")
        self.kind = None
        self.out.flush()


class Session:
    """A conversation and the commands on it. `messages` are in TRL's format, reasoning included."""

    def __init__(self, chat_model, screen, system=None):
        self.chat_model, self.screen, self.running = chat_model, screen, True
        self.messages = [{"role": "system", "content": system}] if system else []
        self.commands = {"help": self.help, "reset": self.reset, "system": self.system, "retry": self.retry,
                         "save": self.save, "quit": self.quit, "stop": self.quit, "exit": self.quit}

    def notice(self, text):
        self.screen.show("notice", text)

    def handle(self, line):
        """A command, or a message to be answered; a message that begins with "/" is written with "//"."""
        if line.startswith("/") and not line.startswith("//"):
            name, _, rest = line[1:].partition(" ")
            command = self.commands.get(name)
            if command is None:
                self.notice(f"unknown command /{name}; known are /" + " /".join(self.commands))
            else:
                command(rest.strip())
        elif line.strip():
            self.messages.append({"role": "user", "content": line.removeprefix("/")})
            self.answer()

    def answer(self):
        try:
            prompt = self.chat_model.prompt(self.messages)
            if prompt.dropped:
                self.notice(f"the context is full: the oldest {prompt.dropped} turns are left out")
                self.messages = prompt.messages  # for good: the context only fills up
            reply = self.chat_model.reply(prompt, self.screen.show)
        except BaseException as error:  # a question without an answer would spoil the next prompt
            self.messages.pop()
            if not isinstance(error, (ValueError, TemplateError)):
                raise
            return self.notice(str(error))
        self.screen.end()
        if reply.end == "length":
            self.notice("cut off: the answer reached --max_new_tokens or the end of the context")
        elif reply.end == "stopped":
            self.notice("stopped")
        self.messages.append({"role": "assistant", "content": reply.text})

    def help(self, _):
        self.notice("/reset: forget the conversation  /system TEXT: set the system prompt  /retry: answer again  "
                    "/save FILE: add the conversation to a JSON Lines file  /quit")

    def reset(self, _):
        self.messages = [message for message in self.messages if message["role"] == "system"]
        self.notice("the conversation is forgotten")

    def system(self, text):
        rest = [message for message in self.messages if message["role"] != "system"]
        self.messages = ([{"role": "system", "content": text}] if text else []) + rest
        self.notice("the system prompt is set" if text else "no system prompt")

    def retry(self, _):
        if not self.messages or self.messages[-1]["role"] != "assistant":
            return self.notice("there is no answer yet")
        self.messages.pop()
        self.answer()

    def save(self, name):
        if not name:
            return self.notice("/save needs the name of a file")
        try:
            with open(Path(name).expanduser(), "a", encoding="utf-8") as file:
                file.write(json.dumps({"messages": self.messages}, ensure_ascii=False) + "\n")
        except OSError as error:
            return self.notice(f"not saved: {error}")
        self.notice(f"added to {name}")

    def quit(self, _):
        self.running = False


def read_message(read_line):
    r"""One message from lines: continued after a backslash, or all lines between two lines of three double quotes.

    None at the end of the input.
    """
    line = read_line("> ")
    if line is None:
        return None
    lines = []
    if line.strip() == '"""':
        while (line := read_line(". ")) is not None and line.strip() != '"""':
            lines.append(line)
        return "\n".join(lines)
    while line is not None and line.endswith("\\"):
        lines.append(line[:-1])
        line = read_line(". ")
    return "\n".join([*lines, *([] if line is None else [line])])


def line_reader():
    """A function from a prompt to a line, or None at the end; the prompt appears on a terminal only."""
    terminal = sys.stdin.isatty()
    if terminal:
        try:
            import readline  # noqa: F401  (gives input() arrow keys and a history)
        except ImportError:  # not on every platform
            pass

    def read(prompt):
        if terminal:
            try:
                return input(prompt)
            except EOFError:
                return None
        line = sys.stdin.readline()
        return line.rstrip("\r\n") if line else None
    return read


def main(argv=None):
    """Runs until the input ends or /quit. Returns the conversation."""
    args = parse_arguments(argv)
    if args.seed is not None:
        set_seed(args.seed)
    model, tokenizer = load(args)
    screen = Screen(sys.stdout, color=sys.stdout.isatty() and not os.environ.get("NO_COLOR"))
    session = Session(ChatModel(model, tokenizer, args), screen, args.system)
    read_line = line_reader()
    if sys.stdin.isatty():
        session.help("")
    while session.running:
        try:
            line = read_message(read_line)
            if line is None:
                break
            session.handle(line)
        except KeyboardInterrupt:  # at the prompt, or the second one during an answer
            screen.end()
            screen.out.write("\n")
            session.notice("/quit leaves")
    return session.messages


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:  # what a user can mend needs no traceback
        sys.exit(f"{type(error).__name__}: {error}")
