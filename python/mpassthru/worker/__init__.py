"""The unprivileged process of one port: vhost-user session, engine, nothing else."""
