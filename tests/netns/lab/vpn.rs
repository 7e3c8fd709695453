//! A private network over the wide one, for hosts behind routers: point-to-point interfaces without multicast.

use super::Lab;

const PORT: &str = "51820";

impl Lab {
    /// Makes w1 the hub of a private network 10.80.0.0/24 with these hosts in it, numbered from 1, each by "tun0".
    pub fn vpn(&self, hosts: &[&str]) {
        self.program("w1", "hub of the private network", &["vpn.py", "hub", PORT]);
        let hub = self.ipv4("w1");
        for (number, host) in (1..).zip(hosts) {
            let address = format!("10.80.0.{number}");
            self.program(host, &format!("private network of {host}"), &["vpn.py", "client", "tun0", &address, &hub, PORT]);
        }
    }
}
