//! The part of the network task that listens, and knows which of its addresses others can reach.

use libp2p::Multiaddr;
use tokio::time::Instant;

use super::bootstrap::why;
use super::task::{StartError, Task};
use super::{address, port};

impl Task<'_> {
    /// Opens the listeners. A port that is taken is replaced by a free one when the configuration allows it.
    pub(super) fn listen(&mut self) -> Result<(), StartError> {
        let mut problems = Vec::new();
        let mut listening = 0;
        for text in self.lasting.config.listen.clone() {
            let refused = |reason: String| StartError::Listen { address: text.clone(), reason };
            let address: Multiaddr =
                text.parse().map_err(|error| StartError::Address { address: text.clone(), reason: format!("{error}") })?;
            let mut open = |address: Multiaddr| {
                port::check(&address).map_err(|error| error.to_string())?;
                self.swarm.listen_on(address).map_err(|error| why(&error))
            };
            let any_port = self.lasting.config.any_port;
            match open(address.clone()).or_else(|error| if any_port { open(address::any_port(&address)) } else { Err(error) }) {
                Ok(_) => listening += 1,
                Err(error) => {
                    self.not_listening.push((text.clone(), error.clone()));
                    problems.push(refused(error));
                }
            }
        }
        // A machine without IPv6 has half of the listeners, which is well; none at all is not.
        match problems.into_iter().next() {
            Some(problem) if listening == 0 || !self.lasting.config.any_port => Err(problem),
            Some(problem) => {
                tracing::info!("{problem}");
                Ok(())
            }
            None => Ok(()),
        }
    }

    fn networks_changed(&mut self) {
        self.networks = address::networks_of(self.own_listeners());
        let behaviour = self.swarm.behaviour_mut();
        for networks in [&mut behaviour.kad.networks, &mut behaviour.punch.networks, &mut behaviour.dial_back.networks] {
            networks.clone_from(&self.networks);
        }
        self.tell_mdns_addresses();
    }

    /// A listener got an address. Where no NAT can lie between, it is also what others may dial.
    pub(super) fn on_new_listen_address(&mut self, listening: Multiaddr) {
        self.networks_changed();
        // Loopback is told first. Once there is a network, it must not be announced: others would dial themselves.
        let no_more = |known: &&Multiaddr| !address::is_circuit(known) && !address::announceable(known, &self.networks);
        let stale: Vec<Multiaddr> =
            self.swarm.external_addresses().filter(no_more).filter(|known| !self.is_configured(known)).cloned().collect();
        for address in stale {
            self.unreachable(&address);
        }
        // Without a NAT: as far as is known before anybody has seen us, or because somebody has, at another port of this IP address.
        let open = self.bootstrap.is_empty() || address::is_global(&listening) || self.is_seen_as(&listening);
        if address::announceable(&listening, &self.networks) && open {
            self.reachable(listening.clone());
        }
        self.addresses_moved(&listening, Instant::now());
        self.dirty = true;
    }

    /// Whether others reach the IP address of `listening` as it is.
    fn is_seen_as(&self, listening: &Multiaddr) -> bool {
        let direct = self.swarm.external_addresses().filter(|known| !address::is_circuit(known));
        !address::same_host(listening, direct).is_empty()
    }

    /// Somebody saw us at `observed`. If that is an IP address that we listen on, no NAT lies between, and whoever can
    /// reach that peer can reach us.
    pub(super) fn on_observed(&mut self, observed: &Multiaddr) {
        for address in address::same_host(observed, self.own_listeners()) {
            if address::announceable(&address, &self.networks) {
                self.reachable(address);
            }
        }
    }

    /// Others may dial this node at `address`.
    pub(super) fn reachable(&mut self, address: Multiaddr) {
        if self.swarm.external_addresses().any(|known| *known == address) {
            return;
        }
        tracing::debug!(%address, "reachable address");
        self.swarm.behaviour_mut().punch.candidate(&address);
        self.swarm.add_external_address(address);
        self.addresses_changed();
    }

    fn unreachable(&mut self, address: &Multiaddr) {
        self.swarm.remove_external_address(address);
        self.addresses_changed();
    }

    pub(super) fn on_lost_listen_address(&mut self, address: &Multiaddr) {
        self.networks_changed();
        self.swarm.remove_external_address(address);
        if let Some(ip) = address::lost_ip(address, self.own_listeners()) {
            self.forget_reach(ip);
            self.address_lost();
        }
        self.addresses_moved(address, Instant::now());
        self.dirty = true;
    }
}
