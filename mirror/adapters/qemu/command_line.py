"""QEMU's command line as data: options, and the three ways their values are written.

    -device virtio-blk-pci,drive=d0,serial=a,,b      key=value, ``,,`` stands for a comma
    -device {"driver": "virtio-blk-pci", ...}        JSON (libvirt)
    -device virtio-blk-pci                           the first value's key is implied

Which options exist and which take a value has to be known, or the words after an unknown option
cannot be told apart: an option that is not in the table is an error that names it. The table holds
those of QEMU 4.0 to 10.0 for x86 (qemu-options.hx; read from ``-help`` of 7.2 and 10.0).
What each of them means for a mirror VM is not said here but in mirror_hardware.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from mirror.domain.errors import Refused

OPTIONS_MAX = 4096

_FLAG_NAMES = """
    alt-grab async-teardown ctrl-grab daemonize enable-fips enable-kvm enable-sync-profile full-screen
    jitdump mem-prealloc no-acpi no-fd-bootchk no-frame no-hpet no-kvm no-kvm-irqchip no-quit no-reboot
    no-shutdown no-user-config nodefaults nodefconfig nographic old-param one-insn-per-tb
    only-migratable perfmap portrait preconfig rtc-td-hack S s semihosting singlestep snapshot usb
    win2k-hack xen-attach xen-domid-restrict
"""
_NAMES_WITH_VALUE = """
    accel acpitable action add-fd append audio audiodev balloon bios blockdev boot bt cdrom chardev
    chroot compat cpu curses-charset D d debugcon device dfilter display drive dtb dump-vmstate echr fda
    fdb fsdev fw_cfg g gdb global hda hdb hdc hdd icount incoming initrd iscsi k kernel
    kvm-shadow-memory L loadvm M m machine mem-path mon monitor msg mtdblock name net netdev nic numa
    object option-rom overcommit parallel pflash pidfile plugin prom-env qmp qmp-pretty qtest qtest-log
    readconfig realtime rotate rtc run-with runas sandbox sd seed semihosting-config serial set shim
    smbios smp soundhw spice tb-size tpmdev trace usbdevice uuid vga virtfs virtfs_synth virtioconsole
    vnc watchdog watchdog-action writeconfig xen-domid
"""
_FLAGS = frozenset(_FLAG_NAMES.split())
_WITH_VALUE = frozenset(_NAMES_WITH_VALUE.split())


@dataclass(frozen=True, slots=True)
class Option:
    """``name`` without dashes; ``value`` is None for a flag; a bare word is an ``hda``."""

    name: str
    value: str | None = None

    def render(self) -> tuple[str, ...]:
        return (f"-{self.name}",) if self.value is None else (f"-{self.name}", self.value)


def parse(arguments: Sequence[str]) -> tuple[Option, ...]:
    """The options of a command line without its program name.

    :raises Refused: an option that is not known, or whose value is missing.
    """
    if len(arguments) > OPTIONS_MAX:
        raise Refused(f"a QEMU command line of {len(arguments)} words; at most {OPTIONS_MAX} are read")
    options: list[Option] = []
    words = iter(arguments)
    for word in words:
        if not word.startswith("-"):
            options.append(Option("hda", word))
            continue
        name = word[2:] if word.startswith("--") else word[1:]
        if name in _FLAGS:
            options.append(Option(name))
        elif name in _WITH_VALUE:
            value = next(words, None)
            if value is None:
                raise Refused(f"QEMU option {word} has no value")
            options.append(Option(name, value))
        else:
            raise Refused(
                f"QEMU option {word} is not known to vmirror: what it means for a mirror VM cannot be told"
            )
    return tuple(options)


class Properties:
    """The value of one option: ordered key → value pairs, or a JSON object.

    A key may occur several times in the first form (``hostfwd=`` of a netdev). Values that are
    no text (JSON numbers, objects) are kept as they are.
    """

    def __init__(self, pairs: Iterable[tuple[str, object]], *, as_json: bool, implied: str) -> None:
        self.pairs = list(pairs)
        self.as_json = as_json
        self.implied = implied

    @classmethod
    def parse(cls, text: str, *, implied: str) -> Properties:
        """:raises Refused: JSON that is none."""
        if text.startswith("{"):
            try:
                tree = json.loads(text)
            except (ValueError, RecursionError) as err:
                raise Refused(f"a QEMU option that is no JSON: {text[:80]}") from err
            return cls(tree.items(), as_json=True, implied=implied)
        pairs: list[tuple[str, object]] = []
        for index, word in enumerate(split_at_commas(text)):
            key, equals, value = word.partition("=")
            if equals:
                pairs.append((key, value))
            elif index == 0:
                pairs.append((implied, word))
            else:
                pairs.append((word, "on"))
        return cls(pairs, as_json=False, implied=implied)

    def copy(self) -> Properties:
        return Properties(self.pairs, as_json=self.as_json, implied=self.implied)

    def get(self, key: str, default: str = "") -> str:
        """The last value of a key, as text (JSON true is ``on``)."""
        for name, value in reversed(self.pairs):
            if name == key:
                return as_text(value)
        return default

    def __contains__(self, key: str) -> bool:
        return any(name == key for name, _ in self.pairs)

    def all(self, key: str) -> list[str]:
        return [as_text(value) for name, value in self.pairs if name == key]

    def set(self, key: str, value: object) -> None:
        """Replace a key where it stands, or add it at the end."""
        for index, (name, _) in enumerate(self.pairs):
            if name == key:
                self.pairs[index] = (key, value)
                self.pairs[index + 1 :] = [pair for pair in self.pairs[index + 1 :] if pair[0] != key]
                return
        self.pairs.append((key, value))

    def remove(self, *keys: str) -> None:
        self.pairs = [pair for pair in self.pairs if pair[0] not in keys]

    def flat(self) -> dict[str, str]:
        """Nested JSON as dotted keys (``file.filename``); the same as the key=value form writes them."""
        found: dict[str, str] = {}
        pending: list[tuple[str, object]] = list(self.pairs)
        while pending:
            key, value = pending.pop()
            if isinstance(value, Mapping):
                pending += [(f"{key}.{name}", inner) for name, inner in value.items()]
            else:
                found[key] = as_text(value)
        return found

    def render(self) -> str:
        if self.as_json:
            return json.dumps(dict(self.pairs), separators=(",", ":"))
        words = []
        for index, (key, value) in enumerate(self.pairs):
            text = as_text(value).replace(",", ",,")
            words.append(text if index == 0 and key == self.implied and "=" not in text else f"{key}={text}")
        return ",".join(words)


def split_at_commas(text: str) -> list[str]:
    """Split at single commas; a doubled one is a comma in the value."""
    words, word, index = [], "", 0
    while index < len(text):
        if text[index] != ",":
            word += text[index]
        elif text[index + 1 : index + 2] == ",":
            word += ","
            index += 1
        else:
            words.append(word)
            word = ""
        index += 1
    return [*words, word]


def as_text(value: object) -> str:
    """As QEMU's key=value form writes it."""
    if isinstance(value, bool):
        return "on" if value else "off"
    return value if isinstance(value, str) else json.dumps(value) if isinstance(value, list) else str(value)


def parse_config_file(text: str) -> tuple[Option, ...]:
    """The options of a ``-readconfig`` file: ``[group "id"]`` sections of ``key = "value"`` lines.

    :raises Refused: a line that is neither.
    """
    options: list[Option] = []
    group, pairs = "", list[tuple[str, object]]()

    def end_section() -> None:
        if group:
            options.append(Option(group, Properties(pairs, as_json=False, implied="").render()))

    for line in text.splitlines():
        stripped = line.strip()
        if not stripped or stripped.startswith("#"):
            continue
        if stripped.startswith("[") and stripped.endswith("]"):
            end_section()
            group, _, name = stripped[1:-1].partition(" ")
            pairs = [("id", name.strip().strip('"'))] if name.strip() else []
            if group not in _WITH_VALUE:
                raise Refused(f"section [{group}] of a QEMU config file is not known to vmirror")
            continue
        key, equals, value = stripped.partition("=")
        if not equals or not group:
            raise Refused(f"not understood in a QEMU config file: {stripped[:80]}")
        pairs.append((key.strip(), value.strip().strip('"')))
    end_section()
    return tuple(options)
