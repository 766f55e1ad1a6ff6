"""Who may connect: the authorization objects that parameter `tls-authz` names (channels.md §3).

    authz-simple     exactly one identity
    authz-list       rules, the first that matches decides; a policy where none does
    authz-listfile   the same, from a JSON file

An identity is what TLS has proved: the distinguished name of a certificate as GnuTLS writes it, in the certificate's own
order (`C=XX,O=Example\\, Inc.,CN=client.test`), or the user name of a pre-shared key.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ..errors import OptionError

POLICIES = ("deny", "allow")
FORMATS = ("exact", "glob")


class Authorizer(Protocol):
    """What a TLS server asks."""

    def is_allowed(self, identity: str) -> bool:
        """Whether the peer with this proved *identity* may go on; OptionError when that cannot be found out."""


@dataclass(frozen=True)
class SimpleAuthorizer:
    """authz-simple: one identity may."""

    identity: str

    def is_allowed(self, identity: str) -> bool:
        return identity == self.identity


@dataclass(frozen=True)
class Rule:
    """One rule of a list; in format `glob` an asterisk stands for any text and a question mark for one character."""

    match: str
    policy: str
    format: str = "exact"

    def matches(self, identity: str) -> bool:
        if self.format == "exact":
            return identity == self.match
        pattern = re.escape(self.match).replace(r"\*", ".*").replace(r"\?", ".")
        return re.fullmatch(pattern, identity, re.DOTALL) is not None


@dataclass(frozen=True)
class ListAuthorizer:
    """authz-list: the first rule that matches decides, else *policy*."""

    rules: tuple[Rule, ...]
    policy: str = "deny"

    def is_allowed(self, identity: str) -> bool:
        deciding = next((rule.policy for rule in self.rules if rule.matches(identity)), self.policy)
        return deciding == "allow"


class FileAuthorizer:
    """authz-listfile: a list in the JSON file *filename*, read again when it has changed, unless *refresh* is off."""

    def __init__(self, filename: str, refresh: bool) -> None:
        self._filename = filename
        self._refresh = refresh
        self._stamp = self._look()
        self._list = self._read()

    def is_allowed(self, identity: str) -> bool:
        if self._refresh and (stamp := self._look()) != self._stamp:
            self._list = self._read()
            self._stamp = stamp
        return self._list.is_allowed(identity)

    def _look(self) -> tuple[int, int, int]:
        try:
            status = os.stat(self._filename)
        except OSError as error:
            raise self._refusal(f"cannot be read: {os.strerror(error.errno or 0)}") from error
        return status.st_mtime_ns, status.st_size, status.st_ino

    def _read(self) -> ListAuthorizer:
        try:
            with open(self._filename, encoding="utf-8") as file:
                value = json.load(file)
        except OSError as error:
            raise self._refusal(f"cannot be read: {os.strerror(error.errno or 0)}") from error
        except (ValueError, RecursionError) as error:
            raise self._refusal(f"is not JSON: {error}") from error
        if not isinstance(value, dict) or not set(value) <= {"rules", "policy"}:
            raise self._refusal("is not an object of 'rules' and 'policy'")
        return make_list(value.get("rules", []), value.get("policy", "deny"))

    def _refusal(self, what: str) -> OptionError:
        return OptionError(f"authorization file '{self._filename}' {what}", name="filename", value=self._filename)


def make_list(rules: Any, policy: Any) -> ListAuthorizer:
    """A list from plain values that anybody may have written; OptionError names the one that is wrong."""
    _check_choice("policy", policy, POLICIES)
    if not isinstance(rules, Sequence) or isinstance(rules, str):
        raise OptionError("Invalid parameter type for 'rules', expected: array", name="rules", value=rules)
    return ListAuthorizer(tuple(_make_rule(index, rule) for index, rule in enumerate(rules)), policy)


def _make_rule(index: int, rule: Any) -> Rule:
    place = f"rules[{index}]"
    if not isinstance(rule, Mapping):
        raise OptionError(f"Invalid parameter type for '{place}', expected: object", name=place, value=rule)
    for name in ("match", "policy"):
        if name not in rule:
            raise OptionError(f"Parameter '{place}.{name}' is missing", name=f"{place}.{name}")
    for name in rule:
        if name not in ("match", "policy", "format"):
            raise OptionError(f"Parameter '{place}.{name}' is unexpected", name=f"{place}.{name}", value=rule[name])
    if not isinstance(rule["match"], str):
        text = f"Invalid parameter type for '{place}.match', expected: string"
        raise OptionError(text, name=f"{place}.match", value=rule["match"])
    form = rule.get("format", "exact")
    _check_choice("policy", rule["policy"], POLICIES)
    _check_choice("format", form, FORMATS)
    return Rule(rule["match"], rule["policy"], form)


def _check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    if value not in choices:
        raise OptionError(f"Parameter '{name}' does not accept value '{value}'", name=name, value=value)
