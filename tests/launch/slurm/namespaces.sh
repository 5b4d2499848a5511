# First process of the cluster's own mount, PID, network and host name namespaces; when it ends, all in them end.
# Nothing outside them changes: neither /etc/hosts nor /run, no port is taken, no daemon outlives the test.
# $1: the directory of the cluster.
set -eu
mount --make-rprivate /
mount --bind "$1/hosts" /etc/hosts
mount -t tmpfs tmpfs /run
mkdir -m 755 /run/munge
hostname slurm
ip link set lo up
ip address add 10.0.0.1/32 dev lo  # slurmdbd does not listen where 127.0.0.1 is the only address
touch "$1/ready"
while :; do sleep 1; done
