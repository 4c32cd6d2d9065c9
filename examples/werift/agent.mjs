#!/usr/bin/env node
// An agent on werift, WebRTC in TypeScript alone. Told only Halfway's URL and a token, it opens a data channel to another
// agent.
import { lookup } from 'node:dns/promises'
import { setTimeout as sleep } from 'node:timers/promises'
import { RTCPeerConnection } from 'werift'
import WebSocket from 'ws'
import { commandLine, fetchIce, pairFlags } from '../cli.mjs'
import { Inbox, sendAll } from '../exchange.mjs'

const { url, tls, flags, relayOnly } = commandLine(pairFlags)
const [messages, size, blob] = [flags.messages, flags.size, flags.blob].map(Number)
const reliability = { ordered: {}, unordered: { ordered: false }, lossy: { ordered: false, maxRetransmits: 0 } }
const HIGH_WATER = 256 * 1024

const ice = await fetchIce(url, tls)
const udp = !tls.turnTransport || tls.turnTransport === 'udp'
// Without UDP there is nothing but the relay. Told so, werift does not wait for STUN, five seconds, before it checks any path.
if (relayOnly || !udp) ice.iceTransportPolicy = 'relay'
if (udp) for (const server of ice.iceServers) server.urls = await reachable(server.urls)

await Promise.race([callItself(), sleep(1_000)]).catch(() => {})
const socket = new WebSocket(new URL('/v1/ws', url), 'halfway.v1', tls)
let handled = Promise.resolve()
socket.on('open', () => signal({ type: 'hello', card: { name: 'werift' } }))
socket.on('message', (text) => {
  const frame = JSON.parse(text)
  handled = handled.then(() => receive(frame)).catch(fail)
})
socket.on('error', fail)
socket.on('close', (code) => {
  if (process.exitCode === undefined) console.error(`signaling closed (${code})`)
  process.exit(process.exitCode ?? 1) // werift leaves timers behind
})

/**
 * Werift's first call takes a tenth of a second more than others, for its certificate, and for code that is not compiled yet: that one
 * is to itself, by host candidates, before anybody can call.
 */
async function callItself() {
  const [caller, called] = [new RTCPeerConnection({ iceServers: [] }), new RTCPeerConnection({ iceServers: [] })]
  caller.onIceCandidate.subscribe((candidate) => candidate && called.addIceCandidate(candidate))
  called.onIceCandidate.subscribe((candidate) => candidate && caller.addIceCandidate(candidate))
  const channel = caller.createDataChannel('')
  await caller.setLocalDescription(asksNobody(caller, await caller.createOffer()))
  await called.setRemoteDescription(caller.localDescription)
  const answer = asksNobody(called, await called.createAnswer())
  await Promise.all([called.setLocalDescription(answer), caller.setRemoteDescription(answer)])
  await channel.stateChanged.watch((state) => state === 'open')
  await Promise.all([caller.close(), called.close()])
}

/** Without a `stun:` URL werift asks a server of its own choice, which it may wait for. */
function asksNobody(connection, description) {
  for (const transport of connection.iceTransports) transport.connection.stunServer = undefined
  return description
}

// Its TURN over UDP is for IPv4 alone, even where the name has an IPv6 address: it would wait for seven seconds, then take TCP.
async function reachable(urls) {
  const host = /^\w+:([^?]+?)(:\d+)?(\?|$)/.exec(urls[0])[1]
  const { address } = await lookup(host.replace(/[[\]]/g, ''), { family: 4 }).catch(() => ({}))
  return address ? urls.map((url) => url.replace(host, address)) : urls.filter((url) => !/^turn:.*=udp$/.test(url))
}

const inbox = new Inbox()
let peer, connection, offered, answered, gathered, found, release
const released = new Promise((resolve) => (release = resolve))
// The other side's first candidate. Werift gives up at once when it is to check paths and knows of none, and never tries its relay
// for those that it knew before it had one: whoever offers and whoever answers begins when all its own are there, and this one.
const candidate = new Promise((resolve) => (found = resolve))

async function receive(frame) {
  if (frame.type === 'welcome' && frame.agents.some(({ agent }) => agent === flags.to)) await call(flags.to)
  if (frame.type === 'agentJoined' && frame.agent === flags.to && !peer) await call(flags.to)
  if (frame.type === 'error') throw new Error(`${frame.code}: ${frame.message}`)
  if (frame.type === 'offer' && !peer) connect(frame.from)
  if (!peer || frame.from !== peer) return
  if (frame.type === 'offer') await answer(frame.sdp)
  if (frame.type === 'answer') await take({ type: 'answer', sdp: frame.sdp })
  if (frame.type === 'iceCandidate' && takes(frame.candidate)) await add(frame.candidate)
  if (frame.type === 'message') inbox.announce(frame.payload)
  if (frame.type === 'bye') release()
}

// Told that there are no more candidates (null) before its own are gathered, werift gives up at once. And browsers hide
// host addresses behind mDNS names, which it does not survive.
function takes(candidate) {
  return candidate && !/\.local\b/.test(candidate.candidate)
}

/** An answer with candidates in it, of an agent that sends none apart, is good at once; another one with the first candidate. */
async function take(answer) {
  answered = answer
  if (/^a=candidate:/m.test(answer.sdp)) await apply()
}

async function apply() {
  if (!answered) return
  await gathered
  await connection.setRemoteDescription(answered)
  answered = undefined
}

async function add(candidate) {
  await apply()
  await connection.addIceCandidate(candidate)
  found()
}

async function call(agent) {
  connect(agent)
  talk(connection.createDataChannel(flags.channel, reliability[flags.channel]))
  keepEarly()
  describe(await connection.createOffer())
}

async function answer(sdp) {
  await connection.setRemoteDescription({ type: 'offer', sdp })
  if (/^a=candidate:/m.test(sdp)) found()
  keepEarly()
  // It begins by itself when it has gathered.
  const [transport] = connection.iceTransports
  const gather = transport.gather.bind(transport)
  transport.gather = () => Promise.all([gather(), candidate])
  describe(await connection.createAnswer())
}

/** The other side may have a path first, and begin DTLS. Werift drops what comes then; here it hears it once it listens. */
function keepEarly() {
  const [transport] = connection.dtlsTransports
  const { onData } = transport.iceTransport.connection
  const early = []
  const { unSubscribe } = onData.subscribe((packet) => early.length < 8 && early.push(packet))
  const replay = () => {
    unSubscribe()
    early.forEach((packet) => onData.execute(packet))
  }
  transport.onStateChange.once(() => queueMicrotask(replay))
}

/** Sends the description before the candidates, which werift begins to gather then; nobody waits until it has them all. */
function describe({ type, sdp }) {
  signal({ type, to: peer, sdp })
  gathered = connection.setLocalDescription({ type, sdp }).catch(fail)
}

function connect(agent) {
  peer = agent
  offered = Date.now()
  connection = new RTCPeerConnection(ice)
  connection.onIceCandidate.subscribe((candidate) => signal({ type: 'iceCandidate', to: peer, candidate: candidate ?? null }))
  connection.connectionStateChange.subscribe((state) => state === 'failed' && fail(new Error('no path to the other agent')))
  connection.onDataChannel.subscribe(talk)
}

async function talk(channel) {
  // Created here or announced by the other agent, the channel bears the name of its kind.
  inbox.lossy = channel.label === 'lossy'
  channel.onMessage.subscribe((data) => inbox.take(data))
  if (channel.readyState !== 'open') await channel.stateChanged.watch((state) => state === 'open')
  const opened_ms = Date.now() - offered
  const pair = connection.sctp.transport.iceTransport.getSelectedCandidatePair()
  // What is said while a channel opens may be lost (examples/README.md): who answers speaks when something has come.
  if (!flags.to) await inbox.begun
  await sendAll(writer(channel), { messages, size, blob, lossy: inbox.lossy })
  signal({ type: 'message', to: peer, payload: { messages, blob } })
  await inbox.complete
  signal({ type: 'bye', to: peer })
  await released
  const [local, remote] = [pair?.local, pair?.remote].map((side) => side?.candidate.match(/ typ (\w+)/)[1])
  console.log(JSON.stringify({ opened_ms, ...inbox.summary, local, remote }))
  finish(inbox.sound ? 0 : 1)
}

/** Sends on a channel, and waits while it holds more than the network takes. */
function writer(channel) {
  channel.bufferedAmountLowThreshold = HIGH_WATER / 2
  return async (data) => {
    channel.send(typeof data === 'string' ? data : Buffer.from(data))
    if (channel.bufferedAmount > HIGH_WATER) await channel.bufferedAmountLow.asPromise()
  }
}

function signal(frame) {
  socket.send(JSON.stringify(frame))
}

function fail(error) {
  console.error(error.message)
  finish(1)
}

async function finish(code) {
  process.exitCode = code
  await connection?.close()
  socket.close()
}
