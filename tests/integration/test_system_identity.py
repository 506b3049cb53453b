"""Clones of machines: what each draws and is told, that no other may have; in kernel and user space."""

import base64
import shutil
import subprocess
from collections.abc import Sequence

import pytest

from tests.integration.daemon import Daemon, until

pytestmark = pytest.mark.root

BOOT_ID = "/proc/sys/kernel/random/boot_id"
ASK = "echo >/ask; cat /answer"
GENERATORS = f"""
draw() {{ head -c 16 /dev/urandom | od -An -tx8 | tr -d ' '; }}
boot=$(cat {BOOT_ID}) seed=$(draw)
mkfifo /answer /ask.new
mv /ask.new /ask
while read -r _ </ask; do
    now=$(cat {BOOT_ID})
    [ "$now" = "$boot" ] || {{ boot=$now; seed=$(draw); }}
    number=$RANDOM$RANDOM$RANDOM$RANDOM
    echo "$number $seed$number $(draw) $now" >/answer
done
"""
"""One process with generators of three kinds: that never reseeds, that does when the boot id has changed, and that asks
the kernel each time."""

READY = "mkfifo /answer /ask; until [ -e /ready ]; do sleep 0.05; done; exec /draw"
DRAW = r"""
#include <elf.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/auxv.h>
#include <sys/mman.h>

typedef long (*Draw)(void *, size_t, unsigned, void *, size_t);
struct Parameters { uint32_t size, protection, flags, reserved[13]; };

static void *symbol(const char *name)
{
    char *base = (char *)getauxval(AT_SYSINFO_EHDR), *strings = 0;
    Elf64_Ehdr *head = (Elf64_Ehdr *)base;
    Elf64_Phdr *part = (Elf64_Phdr *)(base + head->e_phoff);
    Elf64_Sym *symbols = 0;
    uint32_t *hash = 0;
    for (int i = 0; i < head->e_phnum; i++)
        if (part[i].p_type == PT_DYNAMIC)
            for (Elf64_Dyn *entry = (Elf64_Dyn *)(base + part[i].p_offset); entry->d_tag; entry++) {
                char *where = base + entry->d_un.d_ptr;
                if (entry->d_tag == DT_STRTAB) strings = where;
                if (entry->d_tag == DT_SYMTAB) symbols = (Elf64_Sym *)where;
                if (entry->d_tag == DT_HASH) hash = (uint32_t *)where;
            }
    for (uint32_t i = 0; hash && i < hash[1]; i++)
        if (!strcmp(strings + symbols[i].st_name, name)) return base + symbols[i].st_value;
    return 0;
}

int main(void)
{
    struct Parameters wanted;
    unsigned char drawn[16];
    char line[16];
    Draw draw = (Draw)symbol("__vdso_getrandom");
    if (!draw || draw(0, 0, 0, &wanted, ~0UL)) return 1;
    void *state = mmap(0, wanted.size, wanted.protection, wanted.flags, -1, 0);
    if (state == MAP_FAILED) return 2;
    for (;;) {
        FILE *ask = fopen("/ask", "r"), *answer;
        if (!ask || !fgets(line, sizeof line, ask)) return 3;
        fclose(ask);
        if (draw(drawn, sizeof drawn, 0, state, wanted.size) != sizeof drawn) return 4;
        answer = fopen("/answer", "w");
        for (size_t i = 0; i < sizeof drawn; i++) fprintf(answer, "%02x", drawn[i]);
        fclose(answer);
    }
}
"""
"""The generator in user space of today's C libraries: it draws from a buffer of its own, filled by what the kernel last
gave it, and looks each time whether the kernel has renewed its numbers since."""


@pytest.fixture(scope="session")
def generator(tmp_path_factory: pytest.TempPathFactory) -> str:
    """DRAW as a static program, in base64."""
    if not shutil.which("cc"):
        pytest.skip("cc is not installed")
    source = tmp_path_factory.mktemp("generator") / "draw.c"
    source.write_text(DRAW)
    target = source.with_suffix("")
    subprocess.run(["cc", "-O1", "-static", "-s", "-o", target, source], check=True, timeout=120)
    return base64.b64encode(target.read_bytes()).decode()


def run(daemon: Daemon, name: str, script: str) -> None:
    daemon.ok("run", "-d", "--name", name, "--isolation", "vm", "busybox", "sh", "-c", script)


def inside(daemon: Daemon, name: str, script: str) -> str:
    return daemon.ok("exec", name, "sh", "-c", script)


def drawing(daemon: Daemon, name: str) -> None:
    run(daemon, name, GENERATORS)
    until(lambda: inside(daemon, name, "ls /").count("ask\n"))


def drawn(daemon: Daemon, names: Sequence[str]) -> list[set[str]]:
    """What each of the generators draws next in all of them, and the boot ids."""
    answers = [inside(daemon, name, ASK).split() for name in names]
    assert all(len(answer) == 4 for answer in answers), answers
    return [set(column) for column in zip(*answers, strict=True)]


def test_forks_of_one_moment_draw_what_no_other_draws(daemon: Daemon) -> None:
    """But by a generator that never asks the kernel again: it goes on like its original, as the manual says."""
    drawing(daemon, "web")
    before = inside(daemon, "web", ASK).split()
    forks = daemon.ok("fork", "--count", "2", "--name-prefix", "copy-", "web").split()
    never, noticing, each, boots = drawn(daemon, ["web", *forks])
    assert len(never) == 1
    assert len(noticing) == len(each) == len(boots) == 3
    assert before[3] in boots  # the original's is what it was
    daemon.ok("fork", "--name", "grandchild", "copy-1")
    _, noticing, each, more = drawn(daemon, ["copy-1", "grandchild"])
    assert len(noticing) == len(each) == len(more) == 2
    assert len(boots | more) == 4


def test_instances_of_one_template_draw_what_no_other_draws(daemon: Daemon) -> None:
    for name in ("one", "two"):
        drawing(daemon, name)
    templates = {daemon.instance(name)["status"]["machine"]["template"] for name in ("one", "two")}
    assert len(templates) == 1
    assert "" not in templates
    _, noticing, each, boots = drawn(daemon, ["one", "two"])
    assert len(noticing) == len(each) == len(boots) == 2


def test_the_boot_id_is_one_boot_long(daemon: Daemon) -> None:
    """Commands see what the instance's own processes see; nobody inside who is not root can write it."""
    drawing(daemon, "web")
    first = inside(daemon, "web", f"cat {BOOT_ID}")
    assert inside(daemon, "web", ASK).split()[3] == first
    assert daemon.cli("exec", "--user", "1000", "web", "sh", "-c", f"echo x >{BOOT_ID}").returncode != 0
    daemon.ok("restart", "-t", "0", "web")
    until(lambda: inside(daemon, "web", "ls /").count("ask\n"))
    second = inside(daemon, "web", f"cat {BOOT_ID}")
    assert len(first) == len(second) == 36
    assert first != second


def test_a_generator_of_the_c_library_notices_that_it_was_cloned(daemon: Daemon, generator: str) -> None:
    run(daemon, "web", READY)
    until(lambda: daemon.phase("web") == "running")
    daemon.ok("exec", "-i", "web", "sh", "-c", "base64 -d >/draw; chmod +x /draw; touch /ready", input=generator)
    assert len(inside(daemon, "web", ASK)) == 32  # its buffer is filled
    forks = daemon.ok("fork", "--count", "2", "--name-prefix", "copy-", "web").split()
    assert len({inside(daemon, name, ASK) for name in ("web", *forks)}) == 3
