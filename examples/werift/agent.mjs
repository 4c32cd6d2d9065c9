#!/usr/bin/env node
// An agent on werift, WebRTC in TypeScript alone. Told only Halfway's URL and a token, it opens a data channel to another
// agent.
import { readFileSync } from 'node:fs'
import https from 'node:https'
import { setTimeout as sleep } from 'node:timers/promises'
import { parseArgs } from 'node:util'
import { RTCPeerConnection } from 'werift'
import WebSocket from 'ws'
import { Inbox, sendAll } from '../exchange.mjs'

const { values: flags, positionals } = parseArgs({
  allowPositionals: true,
  options: {
    token: { type: 'string' },
    ca: { type: 'string' },
    to: { type: 'string' },
    'relay-only': { type: 'boolean', default: false },
    channel: { type: 'string', default: 'ordered' },
    messages: { type: 'string', default: '10' },
    size: { type: 'string', default: '1024' },
    blob: { type: 'string', default: '0' },
  },
})
const [url] = positionals
const [messages, size, blob] = [flags.messages, flags.size, flags.blob].map(Number)
const tls = { ca: flags.ca && readFileSync(flags.ca), headers: { authorization: `Bearer ${flags.token}` } }
const reliability = { ordered: {}, unordered: { ordered: false }, lossy: { ordered: false, maxRetransmits: 0 } }
const HIGH_WATER = 1024 * 1024

const ice = await getJson('/v1/ice')
if (flags['relay-only']) ice.iceTransportPolicy = 'relay'

const socket = new WebSocket(new URL('/v1/ws', url), 'halfway.v1', tls)
let handled = Promise.resolve()
socket.on('open', () => signal({ type: 'hello', card: { name: 'werift' } }))
socket.on('message', (text) => {
  const frame = JSON.parse(text)
  handled = Promise.all([handled, hold(frame)]).then(() => receive(frame)).catch(fail)
})
socket.on('error', fail)
socket.on('close', (code) => {
  if (process.exitCode === undefined) console.error(`signaling closed (${code})`)
  process.exit(process.exitCode ?? 1) // werift leaves timers behind
})

let peer, connection, offered, inbox, release

// Whoever offers starts its checks after the one who answers: then its own get through first. The other way about, the
// answering side would begin DTLS with a side that does not listen yet, and try again a second later.
function hold({ type }) {
  if (flags.to && ['answer', 'iceCandidate'].includes(type)) return sleep(150)
}

async function receive(frame) {
  if (frame.type === 'welcome' && frame.agents.some(({ agent }) => agent === flags.to)) await call(flags.to)
  if (frame.type === 'agentJoined' && frame.agent === flags.to && !peer) await call(flags.to)
  if (frame.type === 'error') throw new Error(`${frame.code}: ${frame.message}`)
  if (frame.type === 'offer' && !peer) connect(frame.from)
  if (!peer || frame.from !== peer) return
  if (frame.type === 'offer') await answer(frame.sdp)
  if (frame.type === 'answer') await connection.setRemoteDescription({ type: 'answer', sdp: frame.sdp })
  if (frame.type === 'iceCandidate') await connection.addIceCandidate(frame.candidate)
  if (frame.type === 'message') inbox.announce(frame.payload)
  if (frame.type === 'bye') release()
}

async function call(agent) {
  connect(agent)
  talk(connection.createDataChannel(flags.channel, reliability[flags.channel]))
  await describe(await connection.createOffer())
}

async function answer(sdp) {
  await connection.setRemoteDescription({ type: 'offer', sdp })
  await describe(await connection.createAnswer())
}

/** Sends the description before the candidates, which werift begins to gather at once. */
async function describe({ type, sdp }) {
  signal({ type, to: peer, sdp })
  await connection.setLocalDescription({ type, sdp })
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
  const lossy = channel.label === 'lossy'
  inbox = new Inbox({ lossy })
  const released = new Promise((resolve) => (release = resolve))
  channel.onMessage.subscribe((data) => inbox.take(data))
  if (channel.readyState !== 'open') await channel.stateChanged.watch((state) => state === 'open')
  const opened_ms = Date.now() - offered
  const pair = connection.sctp.transport.iceTransport.getSelectedCandidatePair()
  await sendAll(writer(channel), { messages, size, blob, lossy })
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

function getJson(path) {
  return new Promise((resolve, reject) => {
    https.get(new URL(path, url), tls, async (response) => {
      let body = ''
      for await (const part of response.setEncoding('utf8')) body += part
      if (response.statusCode === 200) resolve(JSON.parse(body))
      else reject(new Error(`GET ${path}: ${response.statusCode} ${body}`))
    }).on('error', reject)
  })
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
