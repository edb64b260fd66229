"""Fake `gcloud` and `az`: the parts of their command lines that forge uses, on objects in a file.

They refuse what the real ones refuse: a rule that does not exist, a word that is no option of theirs. Every call is
recorded with its arguments, so that a test can see that each value was one argument.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FOLDER = "FORGE_TEST_CLOUD"


@dataclass(frozen=True)
class CloudTools:
    """The tools in a folder, which a test puts in front of PATH."""

    folder: Path

    @classmethod
    def install(cls, folder: Path) -> CloudTools:
        """Write the programs and an empty cloud."""
        (folder / "bin").mkdir(parents=True)
        for name in ("gcloud", "az"):
            program = folder / "bin" / name
            line = f'exec {shlex.quote(sys.executable)} -S -E {shlex.quote(__file__)} {name} "$@"'
            program.write_text(f"#!/bin/sh\n{line}\n")
            program.chmod(0o755)
        tools = cls(folder)
        tools.write({"rules": {}, "groups": {}, "nsgs": {}, "vnets": {}, "others": []})
        (folder / "calls.jsonl").touch()
        return tools

    @property
    def environment(self) -> dict[str, str]:
        return {"PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}", FOLDER: str(self.folder)}

    @property
    def world(self) -> dict[str, Any]:
        """All objects of the cloud."""
        found: dict[str, Any] = json.loads((self.folder / "world.json").read_text())
        return found

    def write(self, world: dict[str, Any]) -> None:
        (self.folder / "world.json").write_text(json.dumps(world))

    def calls(self) -> list[list[str]]:
        """The arguments of every call, in order."""
        return [json.loads(line) for line in (self.folder / "calls.jsonl").read_text().splitlines()]

    def refuse(self, *words: str) -> None:
        """Fail every call that has all of these words, as a tool without rights does."""
        (self.folder / "refused.json").write_text(json.dumps(words))

    def add_rays_network(self, prefix: str) -> None:
        """What Ray's template creates on Azure: a group of rules open to all, and a network unless there is one."""
        world = self.world
        world["nsgs"][f"{prefix}-nsg"] = {"name": f"{prefix}-nsg", "rules": {"SSH": ["*"]}}
        subnet = {"name": f"{prefix}-subnet", "networkSecurityGroup": {"id": f"/x/{prefix}-nsg"}}
        world["vnets"].setdefault(f"{prefix}-vnet", {"name": f"{prefix}-vnet", "subnets": [subnet]})
        self.write(world)

    def sources_of_ssh(self, prefix: str) -> set[str]:
        """The addresses from which port 22 of a machine on Azure is reached: those that both groups allow."""
        world = self.world
        (subnet,) = world["vnets"][f"{prefix}-vnet"]["subnets"]
        groups = {subnet["networkSecurityGroup"]["id"].rpartition("/")[2], f"{prefix}-nsg"}
        allowed = [
            {source for sources in world["nsgs"][name]["rules"].values() for source in sources}
            for name in groups
            if name in world["nsgs"]
        ]
        narrow = [sources for sources in allowed if "*" not in sources]
        return set.intersection(*narrow) if narrow else {"*"}


def main() -> None:
    folder = Path(os.environ[FOLDER])
    tool, *words = sys.argv[1:]
    with (folder / "calls.jsonl").open("a") as calls:
        calls.write(json.dumps([tool, *words]) + "\n")
    refused = folder / "refused.json"
    if refused.exists() and set(json.loads(refused.read_text())) <= {tool, *words}:
        sys.exit("ERROR: you do not have the right")
    tools = CloudTools(folder)
    world = tools.world
    answer = _gcloud(words, world) if tool == "gcloud" else _az(words, world)
    tools.write(world)
    if answer is not None:
        sys.stdout.write(json.dumps(answer))


def _gcloud(words: list[str], world: dict[str, Any]) -> Any:
    assert words[:2] == ["compute", "firewall-rules"], words
    verb, rest, rules = words[2], words[3:], world["rules"]
    names = [word for word in rest if not word.startswith("--")]
    options = dict(word[2:].partition("=")[::2] for word in rest if word.startswith("--"))
    if verb == "list":
        return list(rules.values())  # more than the filter says: the caller has to compare
    (name,) = names
    if (name in rules) == (verb == "create"):
        sys.exit(f"ERROR: {name} exists: {name in rules}")
    if verb == "delete":
        del rules[name]
        return None
    known = {"source-ranges", "source-tags", "target-tags", "priority", "rules", "description", "project", "quiet"}
    known |= {"action", "direction"} if verb == "create" else set()
    assert set(options) <= known, set(options) - known
    rules.setdefault(name, {"name": name}).update(options)
    return None


def _az(words: list[str], world: dict[str, Any]) -> Any:
    count = next(index for index, word in enumerate(words) if word.startswith("--"))
    verb, options = " ".join(words[:count]), _options(words[count:])
    assert options.pop("--subscription"), words
    group = options.pop("--resource-group", [""])[0]
    if group and group not in world["groups"]:
        sys.exit(f"ERROR: (ResourceGroupNotFound) Resource group '{group}' could not be found.")
    name = options.get("--name", [""])[0]
    tags = dict(word.partition("=")[::2] for word in options.get("--tags", []))
    nsgs, vnets = world["nsgs"], world["vnets"]
    match verb:
        case "group list":
            return list(world["groups"].values())
        case "group create":
            world["groups"][name] = {"name": name, "location": options["--location"][0], "tags": tags}
        case "group delete":
            assert not nsgs and not vnets and not world["others"], "something is in it"
            del world["groups"][name]
        case "resource list":
            kinds = {"networkSecurityGroups": nsgs, "virtualNetworks": vnets}
            return [{"name": one, "type": kind} for kind, found in kinds.items() for one in found] + world["others"]
        case "network nsg list" | "network vnet list":
            return list((nsgs if "nsg" in verb else vnets).values())
        case "network nsg create":
            nsgs[name] = {"name": name, "tags": tags, "rules": {}}
        case "network nsg delete" | "network vnet delete":
            del (nsgs if "nsg" in verb else vnets)[name]
        case "network nsg rule create" | "network nsg rule update":
            rules = nsgs[options["--nsg-name"][0]]["rules"]
            assert "create" in verb or name in rules, "no such rule"
            rules[name] = options["--source-address-prefixes"]
        case "network vnet create":
            subnet = {"name": options["--subnet-name"][0]}
            subnet |= {"networkSecurityGroup": {"id": f"/x/{options['--network-security-group'][0]}"}}
            vnets[name] = {"name": name, "subnets": [subnet]}
        case "network vnet subnet update":
            (subnet,) = vnets[options["--vnet-name"][0]]["subnets"]
            subnet["networkSecurityGroup"] = {"id": f"/x/{options['--network-security-group'][0]}"}
        case _:
            sys.exit(f"ERROR: '{verb}' is misspelled or not recognized by the system.")
    return None


def _options(words: list[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    key = ""
    for word in words:
        if word.startswith("--"):
            key = word
            found[key] = []
        else:
            found[key].append(word)
    return found


if __name__ == "__main__":
    main()
