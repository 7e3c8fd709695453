// A Hyperswarm node for the side-by-side measurement. Prints one JSON event per line on stdout:
//   bootstrap: {"ev":"ready","addr":"IP:PORT"}
//   serve:     {"ev":"joined"}            (announced on the DHT, listening)
//   ask:       {"ev":"peer","name":..} per serving peer seen, {"ev":"response"} for the first prompt answered
//   bench:     ask, then {"ev":"bench","rtt":..,"flight":..}
//   watch:     ask, then stays; {"ev":"gone","name":..} when the connection of a peer closes
const Hyperswarm = require('hyperswarm')
const DHT = require('hyperdht')
const createTestnet = require('hyperdht/testnet')
const crypto = require('crypto')
const [mode, ...rest] = process.argv.slice(2)
const opt = Object.fromEntries(rest.map(a => a.split('=')))
const say = o => process.stdout.write(JSON.stringify(o) + '\n')
const topicOf = name => crypto.createHash('sha256').update(name).digest()
const [bh, bp] = (opt.bootstrap || '127.0.0.1:0').split(':')
const bootstrap = [{ host: bh, port: Number(bp) }]
const now = () => Number(process.hrtime.bigint())
const pct = (a, p) => a[Math.round((a.length - 1) * p)] / 1000

async function main () {
  if (mode === 'bootstrap') {
    const t = await createTestnet(Number(opt.size || 3), { host: opt.host || '127.0.0.1', port: Number(opt.port || 0) })
    say({ ev: 'ready', addr: t.bootstrap[0].host + ':' + t.bootstrap[0].port })
    return
  }
  const dhtOpts = { bootstrap }
  if (opt.host) dhtOpts.host = opt.host // bind one address, as hyperdht's own testnet does
  if (opt.firewalled === '0') dhtOpts.firewalled = false
  const swarm = new Hyperswarm({ dht: new DHT(dhtOpts) })
  swarm.on('error', () => {})
  if (mode === 'serve') {
    swarm.on('connection', c => {
      c.on('error', e => { if (process.env.DBG) console.error(mode, opt.name, e.code, e.message) })
      c.write(JSON.stringify({ hello: opt.name }))
      c.on('data', d => c.write(d)) // echo, message framed by secret-stream
    })
    const d = swarm.join(topicOf(opt.cluster), { server: true, client: opt.client === '1' })
    await d.flushed()
    say({ ev: 'joined' })
    return
  }
  // ask / bench / watch
  let first = null
  const t0 = now()
  swarm.on('connection', c => {
    c.on('error', e => { if (process.env.DBG) console.error(mode, opt.name, e.code, e.message) })
    let name = null
    c.on('close', () => say({ ev: 'gone', name }))
    c.on('data', d => {
      if (name === null) {
        name = JSON.parse(d).hello
        say({ ev: 'peer', name, ms: (now() - t0) / 1e6 })
        if (!first) { first = c; c.write(prompt(0, Number(opt.size || 64))) }
        return
      }
      if (c.onmsg) return c.onmsg(d)
      if (c === first && !c.answered) {
        c.answered = true
        say({ ev: 'response', ms: (now() - t0) / 1e6, bytes: d.length })
        if (mode === 'bench') setTimeout(() => bench(c), 300)
      }
    })
  })
  swarm.join(topicOf(opt.cluster), { server: false, client: true })
}
function prompt (id, size) { const b = Buffer.alloc(Math.max(size, 8), 0x61); b.writeUInt32LE(id, 0); return b }
function run (c, n, inflight, size) {
  return new Promise(resolve => {
    const lat = []; const started = new Array(n); let sent = 0; let got = 0
    const t0 = now()
    c.onmsg = d => {
      lat.push(now() - started[d.readUInt32LE(0)])
      if (++got === n) return resolve({ lat, s: (now() - t0) / 1e9 })
      pump()
    }
    function pump () { while (sent < n && sent - got < inflight) { started[sent] = now(); c.write(prompt(sent, size)); sent++ } }
    pump()
  })
}
async function bench (c) {
  const size = Number(opt.size || 64)
  await run(c, 500, 1, size)
  const a = await run(c, Number(opt.n || 10000), 1, size)
  a.lat.sort((x, y) => x - y)
  const b = await run(c, Number(opt.m || 20000), 64, size)
  b.lat.sort((x, y) => x - y)
  say({ ev: 'bench', rtt: { n: a.lat.length, p50_us: pct(a.lat, 0.5), p90_us: pct(a.lat, 0.9), p99_us: pct(a.lat, 0.99), per_s: a.lat.length / a.s }, flight: { n: b.lat.length, per_s: b.lat.length / b.s, p50_us: pct(b.lat, 0.5), p99_us: pct(b.lat, 0.99) } })
}
process.on('SIGTERM', () => process.exit(0))
main().catch(e => { say({ ev: 'error', error: String(e && e.stack || e) }); process.exit(1) })
