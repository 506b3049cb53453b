"""What makes a tree of Debian a system that boots by itself: packages, and a script that is run in it at the end."""

PACKAGES = (
    *("linux-image-cloud-amd64", "initramfs-tools", "grub-pc-bin"),
    *("systemd-sysv", "udev", "dbus"),  # without dbus nobody hears the power button
    *("e2fsprogs", "iproute2", "login", "passwd"),
)

CORE_IMAGE = "/boot/grub/core.img"
LABEL = "alveole-root"

SCRIPT = rf"""
set -eu

# --- Starting: the core knows all it needs, and reads one file, which names whatever kernel is the newest.

mkdir -p /boot/grub
grub-mkimage --directory=/usr/lib/grub/i386-pc --format=i386-pc --prefix='(hd0,msdos1)/boot/grub' \
    --output={CORE_IMAGE} biosdisk part_msdos ext2 linux normal configfile serial terminal echo
for link in vmlinuz initrd.img; do
    [ -e "/$link" ] || {{ echo "/$link is missing: the system has no kernel" >&2; exit 1; }}
done
[ -e /boot/grub/grub.cfg ] || cat >/boot/grub/grub.cfg <<'END'
serial --unit=0 --speed=115200
terminal_input serial console
terminal_output serial console
linux /vmlinuz root=LABEL={LABEL} ro console=tty0 console=ttyS0,115200 net.ifnames=0
initrd /initrd.img
boot
END
grep -qs '^[^#]' /etc/fstab || echo 'LABEL={LABEL} / ext4 errors=remount-ro 0 1' >/etc/fstab

# --- Network: what cloud-init writes has a lower number, and goes before.

[ -s /etc/hosts ] || printf '127.0.0.1 localhost\n::1 localhost ip6-localhost\n' >/etc/hosts
[ -e /etc/resolv.conf ] || [ -L /etc/resolv.conf ] || echo 'nameserver 192.0.0.1' >/etc/resolv.conf
mkdir -p /etc/systemd/network
[ -e /etc/systemd/network/90-alveole.network ] || cat >/etc/systemd/network/90-alveole.network <<'END'
[Match]
Name=eth0

[Network]
Address=192.0.0.2/30
Gateway=192.0.0.1
END
systemctl --root=/ enable systemd-networkd

# --- What each system is to have for itself: it is made at its first boot.

rm -f /etc/ssh/ssh_host_*_key /etc/ssh/ssh_host_*_key.pub /var/lib/systemd/random-seed /var/lib/dbus/machine-id
: >/etc/machine-id
if [ -x /usr/sbin/sshd ]; then
    mkdir -p /etc/systemd/system/ssh.service.d
    printf '[Service]\nExecStartPre=\nExecStartPre=/usr/bin/ssh-keygen -A\nExecStartPre=/usr/sbin/sshd -t\n' \
        >/etc/systemd/system/ssh.service.d/keys.conf
fi
"""
"""Run by the tree's own shell once all else is done to it. Leaves alone what the recipe has said itself."""
