"""Drivers that are known to have zero-copy AF_XDP, and what each one does that a guest's memory would feel.

Every row is a statement about kernel source: `source_file` is where to look when one is doubted. The figures were read
in Linux 6.18 unless a comment says otherwise; `tested` rows were also run against (tests/zerocopy). A driver that is
not listed may still have zero-copy (the kernel says so: `XdpFeatures.zero_copy`); only nobody has read it yet.

The facts that decide whether a buffer may be given to a NIC (`zero_copy`):

* **room**: the driver tells the NIC how long its buffers are. AF_XDP gives it the UMEM's frame size, rounded down to
  128 bytes (include/net/xdp_sock_drv.h); some drivers round further, to whole KiB.
* **hardware limit**: a register that makes the NIC drop longer frames, whatever room it was told of. Only up to some
  MTU.
* **padding** behind the frame, and bytes in front of it.
"""

from __future__ import annotations

from typing import Final

import msgspec


class DriverFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of one driver's zero-copy mode. Bytes of a frame are without FCS."""

    source_file: str
    """In the kernel tree."""
    since: str
    """The kernel that first had it; recalled, not checked."""
    proven: bool = True
    """How far it writes is known. If not, guest memory is not given to it."""
    tested: bool = False
    """The rules were tested against the driver itself."""
    mtu_max_bytes: int | None = None
    """Above this MTU a frame may be chained through several buffers, or lose its bound; None for no limit."""
    room_min_bytes: int = 0
    """Least room for which the driver programs whole frames."""
    hardware_max_bytes: int | None = None
    """The longest frame that the hardware writes, at MTUs up to `mtu_max_bytes`; None where it depends."""
    hardware_max_over_mtu_bytes: int | None = None
    """The same, as a distance from the MTU; None where only the room bounds it."""
    timestamp_bytes: int = 0
    """What the hardware writes in front of a frame that it stamps, moving the frame; the driver decides when."""
    write_align_bytes: int = 1
    """What is written may be padded up to an address that is a multiple of this."""
    writes_virtio_header: bool = False
    """It has its own virtio-net header written directly in front of the frame."""
    buffers_min: int = 0
    """With fewer receive buffers than this it goes wrong: it is given some of ours if the guest has posted too few."""
    max_segments: int = 1
    """Descriptors of one sent frame (`xdp_zc_max_segs`), where the kernel does not tell."""
    frame_min_bytes: int = 60
    """Shorter frames are padded before they are sent: some NICs reset a queue that sends less than 17 bytes."""
    link_flaps: bool = False
    """The link goes down and up each time a socket comes or goes."""
    note: str = ""


_INTEL: Final = "drivers/net/ethernet/intel"
_CHAINS: Final = "above MTU 1500 frames are chained through the guest's memory; keep the private flag legacy-rx off"
_TIMESTAMPS: Final = "a hardware timestamp moves the frame by 16 bytes, which costs a copy"

ZERO_COPY: Final[dict[str, DriverFacts]] = {
    # ice_vsi_cfg_frame_size: max_frame = ICE_RXBUF_1536 - NET_IP_ALIGN (0 or 2, by architecture) up to MTU 1500.
    "ice": DriverFacts(
        source_file=f"{_INTEL}/ice/ice_base.c",
        since="5.5",
        mtu_max_bytes=1500,
        hardware_max_bytes=1536,
        max_segments=8,
        note=_CHAINS,
    ),
    # i40e_vsi_configure_rx: the same bound as ice's.
    "i40e": DriverFacts(
        source_file=f"{_INTEL}/i40e/i40e_main.c",
        since="4.20",
        mtu_max_bytes=1500,
        hardware_max_bytes=1536,
        max_segments=8,
        note=_CHAINS,
    ),
    # ixgbe_set_rx_buffer_len: MHADD.MFS = mtu + 14 + FCS. That tags are allowed on top of it, up to two, is recalled
    # from the data sheet. The 82599 programs whole KiB (ixgbe_configure_srrctl), hence the room.
    "ixgbe": DriverFacts(
        source_file=f"{_INTEL}/ixgbe/ixgbe_main.c",
        since="4.20",
        room_min_bytes=2048,
        hardware_max_over_mtu_bytes=14 + 8,
    ),
    # igb_set_rx_mode: RLPML = IGB_MAX_FRAME_BUILD_SKB = 1536 - NET_IP_ALIGN while mtu + 26 does not exceed that.
    # igb_setup_srrctl: whole KiB, so that below 2048 a frame would be split in two.
    "igb": DriverFacts(
        source_file=f"{_INTEL}/igb/igb_main.c",
        since="6.14",
        tested=True,
        mtu_max_bytes=1508,
        room_min_bytes=2048,
        hardware_max_bytes=1536,
        timestamp_bytes=16,
        link_flaps=True,
        note=_TIMESTAMPS,
        # igb_alloc_rx_buffers_zc: if buffers run out before the end of its ring, the descriptor behind them keeps the
        # length of an earlier lap (igb_xsk.c; seen in Linux 7.3). It is harmless as long as that is not looked at: one
        # round receives 64 frames (NAPI_POLL_WEIGHT), then takes what buffers there are. docs/zero-copy.md.
        buffers_min=64,
    ),
    # igc_set_rx_mode: RLPML = IGC_MAX_FRAME_BUILD_SKB = 2048 - 320 (skb_shared_info) - 64 (NET_SKB_PAD) - 16.
    "igc": DriverFacts(
        source_file=f"{_INTEL}/igc/igc_main.c",
        since="5.14",
        mtu_max_bytes=1622,
        room_min_bytes=2048,
        hardware_max_bytes=1648,
        timestamp_bytes=16,
        note=_TIMESTAMPS,
    ),
    # mlx5e_rx_get_linear_sz_xsk; more than the MTU may arrive "in certain setups" (mlx5e_mpwrq_umr_mode), never more
    # than the chunk. rq_end_pad_mode: WQ_END_PAD_MODE_ALIGN.
    "mlx5_core": DriverFacts(
        source_file="drivers/net/ethernet/mellanox/mlx5/core/en/params.c",
        since="5.3",
        write_align_bytes=64,
        note="pads the end of a frame to 64 bytes",
    ),
    # virtnet_add_recvbuf_xsk: room + header, in front of the frame; the device honours the descriptor's length.
    "virtio_net": DriverFacts(
        source_file="drivers/net/virtio_net.c",
        since="6.11",
        tested=True,
        writes_virtio_header=True,
        note="writes its own header of 10 to 24 bytes in front of the frame",
    ),
    "st_gmac": DriverFacts(source_file="drivers/net/ethernet/stmicro/stmmac/stmmac_main.c", since="5.13", proven=False),
    "idpf": DriverFacts(source_file=f"{_INTEL}/idpf/xsk.c", since="6.18", proven=False),
    "gve": DriverFacts(source_file="drivers/net/ethernet/google/gve/gve_main.c", since="6.4", proven=False),
    "tsnep": DriverFacts(source_file="drivers/net/ethernet/engleder/tsnep_main.c", since="6.4", proven=False),
}
"""By the name that `ethtool -i` shows."""

NO_ZERO_COPY: Final = frozenset(
    {
        "veth", "netkit", "netdevsim", "tun", "tap", "bonding", "fec", "bnxt_en", "hns3", "mana", "ena", "e1000",
        "e1000e", "vmxnet3",
    }
)  # fmt: skip
"""Drivers that have none, so that `doctor` can say that no setting will help."""
