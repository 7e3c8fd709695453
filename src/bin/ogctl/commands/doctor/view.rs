//! What the daemon knows of its network, as `--json` prints it.

use crate::view::views;

views! {
    /// One finding.
    Finding {
        code: String = "Code",
        severity: String = "Severity",
        sentence: String = "Sentence",
        remedy: Option<String> = "Remedy",
        peer: Option<String> = "Peer",
        cluster: Option<String> = "Cluster",
    }

    /// What the findings were drawn from.
    Facts {
        at: Option<u64> = "At",
        peer_id: String = "PeerId",
        listening: Vec<String> = "Listening",
        not_listening: Vec<Refusal> = "NotListening",
        interfaces: Vec<Interface> = "Interfaces",
        mdns: Mdns = "Mdns",
        bootstrap: Vec<Bootstrap> = "Bootstrap",
        reach: Reach = "Reach",
        dht: Dht = "Dht",
        clusters: Vec<Cluster> = "Clusters",
        peers: Vec<Peer> = "Peers",
        same_identity: Vec<String> = "SameIdentity",
        connections: Option<u64> = "Connections",
        max_connections: Option<u64> = "MaxConnections",
        refused: Option<Refused> = "Refused",
        versions: Vec<u64> = "Versions",
        firewall: Option<String> = "Firewall",
        clock_synchronised: Option<bool> = "ClockSynchronised",
        suspended_us: Option<u64> = "SuspendedUSec",
    }

    /// An address that is of no use, and why.
    Refusal {
        address: String = "Address",
        reason: String = "Reason",
    }

    /// A network interface.
    Interface {
        name: String = "Name",
        up: bool = "Up",
        multicast: bool = "Multicast",
        addresses: Vec<String> = "Addresses",
    }

    /// Discovery on the local networks.
    Mdns {
        enabled: bool = "Enabled",
        flooded: bool = "Flooded",
        interfaces: Vec<MdnsOn> = "Interfaces",
    }

    /// The same on one interface, in one family of addresses.
    MdnsOn {
        interface: String = "Interface",
        family: String = "Family",
        sent: Option<u64> = "Sent",
        heard: Option<u64> = "Heard",
        nodes: Option<u64> = "Nodes",
        failed: bool = "Failed",
        heard_us: Option<u64> = "HeardUSec",
        problem: Option<String> = "Problem",
    }

    /// A configured bootstrap node.
    Bootstrap {
        address: String = "Address",
        peer_id: Option<String> = "PeerId",
        connected: bool = "Connected",
        attempts: Vec<Attempt> = "Attempts",
        problem: Option<String> = "Problem",
    }

    /// A dial to one address.
    Attempt {
        address: String = "Address",
        ago_us: Option<u64> = "AgoUSec",
        outcome: String = "Outcome",
        detail: Option<String> = "Detail",
    }

    /// How others reach this node.
    Reach {
        nat: String = "Nat",
        observed: Vec<String> = "Observed",
        announced: Vec<String> = "Announced",
        unreachable: Vec<Refusal> = "Unreachable",
        reservations: Vec<Reservation> = "Reservations",
        relaying: Option<Relaying> = "Relaying",
    }

    /// A place at a relay.
    Reservation {
        peer_id: String = "PeerId",
        name: Option<String> = "Name",
        accepted: bool = "Accepted",
        problem: Option<String> = "Problem",
    }

    /// What this node carries for others.
    Relaying {
        reservations: Option<u64> = "Reservations",
        circuits: Option<u64> = "Circuits",
        refused: Option<u64> = "Refused",
    }

    /// The distributed hash table.
    Dht {
        server: bool = "Server",
        peers: Option<u64> = "Peers",
        answered_us: Option<u64> = "AnsweredUSec",
    }

    /// A joined cluster.
    Cluster {
        id: String = "Id",
        joined_us: Option<u64> = "JoinedUSec",
        members: Option<u64> = "Members",
        known: Option<u64> = "Known",
        serving: Option<u64> = "Serving",
        serves: bool = "Serves",
        announced: bool = "Announced",
    }

    /// Connections that a limit kept out.
    Refused {
        count: Option<u64> = "Count",
        ago_us: Option<u64> = "AgoUSec",
        reason: String = "Reason",
    }

    /// What is known of a peer.
    Peer {
        peer_id: String = "PeerId",
        name: Option<String> = "Name",
        sources: Vec<String> = "Sources",
        heard_us: Option<u64> = "HeardUSec",
        mdns_us: Option<u64> = "MdnsUSec",
        addresses: Vec<String> = "Addresses",
        attempts: Vec<Attempt> = "Attempts",
        next_dial_us: Option<u64> = "NextDialUSec",
        links: Vec<Link> = "Links",
        greetings: Vec<Greeting> = "Greetings",
        member_of: Vec<String> = "MemberOf",
        suspect: bool = "Suspect",
        banned: bool = "Banned",
        bootstrap: bool = "Bootstrap",
    }

    /// A connection.
    Link {
        address: String = "Address",
        dialed: bool = "Dialed",
        transport: String = "Transport",
        direct: bool = "Direct",
        relay: Option<String> = "Relay",
        relay_name: Option<String> = "RelayName",
        age_us: Option<u64> = "AgeUSec",
    }

    /// How greeting a peer in a cluster went.
    Greeting {
        cluster: String = "Cluster",
        ago_us: Option<u64> = "AgoUSec",
        outcome: String = "Outcome",
        versions: Vec<u64> = "Versions",
    }
}
