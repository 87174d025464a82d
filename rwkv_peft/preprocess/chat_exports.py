"""What programs for chats save of them -> rows of messages.

ChatGPT and DeepSeek (conversations.json): {"mapping": {id: {"message": {...}, "parent": id}}, "current_node": id}
Open WebUI: {"chat": {"messages": [...]}}, or {"chat": {"history": {"messages": {id: {...}}, "currentId": id}}}
Glaive's talks: see glaive.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from . import glaive
from .values import RowError

LONGEST = 100_000  # messages of a conversation; a path that is longer goes in a circle
FRAGMENTS = {"REQUEST": "user", "RESPONSE": "assistant", "THINK": "thought"}  # DeepSeek's
LEFT_OUT = ("user_editable_context", "model_editable_context", "reasoning_recap", "system_error")  # of ChatGPT, no talk


def row_of(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """The row with messages, if it is such a conversation; else the row itself."""
    mapping, chat = row.get("mapping"), row.get("chat")
    if (
        isinstance(mapping, dict)
        and mapping
        and all(isinstance(node, dict) and "message" in node for node in mapping.values())
    ):
        rest = {key: value for key, value in row.items() if key not in ("mapping", "current_node", "title")}
        return {key: value for key, value in rest.items() if key not in OF_CHATGPT} | {
            "messages": messages_of_mapping(row)
        }
    if isinstance(chat, dict) and (isinstance(chat.get("messages"), list) or isinstance(chat.get("history"), dict)):
        rest = {key: value for key, value in row.items() if key not in ("chat", *OF_OPEN_WEBUI)}
        return (
            rest
            | {"messages": messages_of_open_webui(chat)}
            | ({"system": chat["system"]} if chat.get("system") else {})
        )
    return glaive.row_of(row) if glaive.is_glaive(row) else row


# what these say of a conversation, and no model could learn
CHATGPT = (
    "moderation_results plugin_ids conversation_template_id gizmo_id gizmo_type is_archived is_starred safe_urls blocked_urls "
    "default_model_slug conversation_origin voice async_status disabled_tool_ids is_do_not_remember memory_scope "
    "sugar_item_id context_scopes inserted_at is_study_mode owner"
)
OF_CHATGPT = frozenset(CHATGPT.split())
OF_OPEN_WEBUI = ("title", "share_id", "archived", "pinned", "folder_id")


def path_to(nodes: Mapping[str, Any], name: Any, parent: str) -> list[Mapping[str, Any]]:
    """The nodes from the beginning to this one."""
    path: list[Mapping[str, Any]] = []
    while isinstance(name, str) and isinstance(nodes.get(name), dict):
        path.append(nodes[name])
        name = nodes[name].get(parent)
        if len(path) > LONGEST or len(path) > len(nodes):
            raise RowError("no beginning", f'its "{parent}" leads back to itself')
    return path[::-1]


def messages_of_mapping(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the messages of a ChatGPT or DeepSeek export, along the path to its current node."""
    nodes = row["mapping"]
    last = row.get("current_node")
    if last not in nodes:  # DeepSeek does not say: the newest path
        last = next((name for name, node in reversed(nodes.items()) if not node.get("children")), None)
    messages: list[dict[str, Any]] = []
    for node in path_to(nodes, last, "parent"):
        message = node["message"]
        if isinstance(message, dict):
            messages += of_deepseek(message, len(messages)) if "author" not in message else of_chatgpt(message)
    return messages


def of_deepseek(message: Mapping[str, Any], before: int) -> list[dict[str, Any]]:
    """The messages of a node of DeepSeek: of fragments, or of content alone, where question and answer take turns."""
    fragments = message.get("fragments")
    if isinstance(fragments, list):
        known = [one for one in fragments if isinstance(one, dict) and one.get("type") in FRAGMENTS]
        return [{"role": FRAGMENTS[one["type"]], "content": one.get("content")} for one in known]
    role = message.get("role") or ("user", "assistant")[before % 2]
    thought = {"reasoning_content": message["reasoning_content"]} if message.get("reasoning_content") else {}
    return [{"role": str(role).lower(), "content": message.get("content"), **thought}]


def of_chatgpt(message: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The message of a node of ChatGPT; none where it holds no talk."""
    content, metadata = message.get("content"), message.get("metadata")
    role = (message.get("author") or {}).get("role")
    if not isinstance(content, dict) or content.get("content_type") in LEFT_OUT:
        return []
    if isinstance(metadata, dict) and metadata.get("is_visually_hidden_from_conversation"):
        return []
    if content.get("content_type") == "thoughts":
        thoughts = [one.get("content") or "" for one in content.get("thoughts") or [] if isinstance(one, dict)]
        text = "\n".join(filter(None, thoughts))
        return [{"role": "thought", "content": text}] if text else []
    parts = content.get("parts", content.get("text", content.get("result")))
    if isinstance(parts, list) and all(isinstance(part, str) for part in parts):
        parts = "".join(parts)
    if parts in ("", []) and role != "user":
        return []
    recipient = message.get("recipient", "all")
    if role == "assistant" and recipient not in ("all", None):  # a call, whose arguments are the words
        return [
            {"role": "assistant", "content": "", "tool_calls": [{"name": recipient, "arguments": {"input": parts}}]}
        ]
    return [{"role": role, "content": parts}]


def messages_of_open_webui(chat: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the messages of an Open WebUI export, along the path to its current message."""
    history = chat.get("history")
    history = history if isinstance(history, dict) else {}
    nodes = history.get("messages")
    if isinstance(nodes, dict) and history.get("currentId") in nodes:
        messages = path_to(nodes, history["currentId"], "parentId")
    else:
        messages = chat.get("messages") or []
    kept = ("role", "content", "files", "images", "reasoning_content", "tool_calls")
    return [{key: value for key, value in one.items() if key in kept} for one in messages if isinstance(one, dict)]
