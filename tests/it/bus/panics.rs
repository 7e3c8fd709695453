//! A panic in a method or a property is answered, and nothing waits for it.

use opengateway::dbus::{Guarded, Readers};

use super::*;

const PATH: &str = "/org/opengateway/Test";
const PANICS: &str = "org.opengateway.Test";
const FAILED: &str = "org.freedesktop.DBus.Error.Failed";

struct Panics;

impl Readers for Panics {}

#[zbus::interface(name = "org.opengateway.Test")]
impl Panics {
    async fn at_once(&self, _number: u32) -> u32 {
        panic!("secret-7d1a");
    }

    async fn later(&self, number: u32) -> u32 {
        tokio::task::yield_now().await;
        (number == 0).then_some(1).expect("0")
    }

    #[zbus(property)]
    fn broken(&self) -> u32 {
        panic!("in a property")
    }

    #[zbus(property)]
    fn whole(&self) -> u32 {
        7
    }
}

fn failure(error: zbus::Error) -> (String, String) {
    use zbus::DBusError as _;
    match error {
        zbus::Error::MethodError(name, message, _) => (name.to_string(), message.unwrap_or_default()),
        zbus::Error::FDO(error) => (error.name().to_string(), error.description().unwrap_or_default().to_owned()),
        other => panic!("{other}"),
    }
}

#[tokio::test]
async fn a_panic_is_an_error_reply_that_tells_nothing_and_the_object_lives_on() {
    let Some(bus) = bus_or_skip() else { return };
    let service = zbus::connection::Builder::address(bus.address()).serve_at(PATH, Guarded(Panics)).build().await.unwrap();
    let name = service.unique_name().unwrap().to_owned();
    let client = bus.connect().await;
    for round in 0..3 {
        for member in ["AtOnce", "Later"] {
            let reply = within(client.call_method(Some(name.clone()), PATH, Some(PANICS), member, &1_u32)).await;
            let (error, message) = failure(reply.unwrap_err());
            assert_eq!(
                (error.as_str(), message),
                (FAILED, format!("a mistake in opengatewayd itself: serving {member} failed")),
                "{round}"
            );
        }
        let properties = Some("org.freedesktop.DBus.Properties");
        let broken = within(client.call_method(Some(name.clone()), PATH, properties, "Get", &(PANICS, "Broken"))).await;
        assert_eq!(failure(broken.unwrap_err()).0, FAILED);
        within(client.call_method(Some(name.clone()), PATH, properties, "GetAll", &(PANICS,))).await.unwrap_err();
        within(client.call_method(Some(name.clone()), PATH, properties, "Get", &(PANICS, "Whole"))).await.unwrap();
    }
    within(client.call_method(Some(name), PATH, Some(PANICS), "Later", &0_u32)).await.unwrap();
}
