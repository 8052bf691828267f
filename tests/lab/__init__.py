"""The lab: whole hosts with real kernels, as ordinary processes of this machine.

A host is a user-mode Linux kernel over this machine's own file tree (same
Python, same virtual environment, same repository), with disks of its own and
a private network whose faults are ours to make:

    with Lab(log_dir) as lab:
        alpha = lab.host("alpha", disks=[Disk("data", 256 * MiB)])
        beta = lab.host("beta")
        net = lab.network(alpha="10.77.0.1/24", beta="10.77.0.2/24")
        lab.boot()
        alpha.run("ping -c 1 10.77.0.2")
        net.cut("alpha", "beta")
        alpha.kill()

Nothing that a host does reaches this machine: its root is an overlay whose
upper layer is the host's own system disk, an image in the lab's temporary
folder, and its network ends in this process.
"""
