"""Zero-copy networking for unmodified virtual machines: vhost-user in front, AF_XDP behind."""
