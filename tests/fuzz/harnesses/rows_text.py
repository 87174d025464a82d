"""Ready texts (.txt, .md by another name): documents by file, line or paragraph; headings of the kit and of others
inside."""

from __future__ import annotations

from fuzz.rows import Rows


class It(Rows):
    ending = ".txt"
    cases = ("*.txt",)
    words = (
        b"User: ", b"\n\nAssistant: ", b"\n\nUser: ", b"System: ", b"### Instruction:\n", b"### Response:\n",
        b"<|im_start|>user\n", b"<|im_end|>\n", b"[INST]", b"[/INST]", b"<s>", b"</s>", b"<|endoftext|>", b"USER: ",
        b"ASSISTANT: ", b"Q: ", b"A: ", b"\n\n", b"\r\n", b"\\n\\n", b"\\u4f60", b"<think>", b"</think>", b"\x17",
        b"<|start_header_id|>user<|end_header_id|>", "用户：".encode(), "\n\n助手：".encode(), b"<image>", b"<system>",
        b"Human: ", b"\n\n\n", b"\\x", b"\\ud800",
    )  # fmt: skip
