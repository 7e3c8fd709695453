//! A node that speaks a version of the membership protocol that nobody speaks any more.

use std::sync::Arc;

use opengateway::domain::cluster::ClusterId;
use opengateway::domain::node::Offer;
use opengateway::net::identity::Identity;
use opengateway::net::{Config, JoinOptions, start};
use opengateway::wire::version::Versions;
use tokio::sync::watch;

use crate::liar::Nothing;
use crate::roles::tell;

/// Joins the cluster of the tests and stays there.
pub async fn play() {
    let (_publish, offer) = watch::channel(Offer::default());
    let config = Config {
        node_name: "OldNode".to_owned(),
        version: "0.0.1".to_owned(),
        listen: vec!["/ip4/0.0.0.0/udp/4001/quic-v1".to_owned(), "/ip4/0.0.0.0/tcp/4001".to_owned()],
        mdns: true,
        versions: Versions::only(0),
        ..Config::default()
    };
    let (net, _running) = start(config, &Identity::generate(), Arc::new(Nothing(offer))).await.unwrap();
    net.join(ClusterId::new(crate::CLUSTER).unwrap(), JoinOptions::default()).await.unwrap();
    tell("joined");
    std::future::pending::<()>().await;
}
