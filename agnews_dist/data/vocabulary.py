"""Vocabulary of the synthetic news: phrases per class, phrases of any class, sentences and names.

A section is `key: phrase|phrase|...`; indented lines continue it. A field in braces is replaced by a phrase of that section,
`{2-90}` by a number of that range. `who`, `did`, `what` and `where` are subjects, verbs, objects and circumstances, with one
section per class; the generator chooses the class.
"""

_TEXT = """
World.who: government troops|rebel fighters|the foreign minister|the prime minister|UN peacekeepers|insurgents|militants
  |opposition leaders|the interior ministry|aid workers|a suicide bomber|election officials|the president|diplomats
  |border guards|the army|police in {city}|a senior cleric|human rights groups|refugees|the ruling coalition|villagers
  |the parliament in {city}|nuclear inspectors|hostage takers|exit polls|the war crimes tribunal|a separatist leader
  |protesters|the ambassador to {country}|{country}'s foreign ministry|the interim government|a guerrilla group
  |soldiers in {country}|the {country} delegation|the Red Cross|the Security Council
World.did: condemned|attacked|agreed to|called for|rejected|signed|vowed to defend|voted on|stormed|shelled|ended|boycotted
  |threatened|accused|negotiated|fled from|demanded|denounced|freed hostages after|mediated|captured|mourned
World.what: a ceasefire|the peace talks|a roadside bombing|the disputed election|the refugee camp|a military convoy
  |a draft constitution|the nuclear programme|a hostage crisis|the embassy|a peace treaty|the border crossing|a UN resolution
  |the besieged town|an arms embargo|the coalition government|a truce in {country}|the rebel stronghold|humanitarian aid
  |the death toll of {count}|a car bomb in {city}|a state of emergency|new sanctions on {country}|the mass protests
  |an air strike|the kidnapping of {count} people|a prisoner exchange|early elections|a coup attempt|the flooded villages
  |the troop withdrawal|a massacre near {city}|an earthquake relief effort
World.where: in the capital {city}|near the border with {country}|at a summit in {city}|in a northern province of {country}
  |in which {count} people were killed|after {count} days of fighting|amid growing violence|in the occupied territory
  |outside the parliament|during Friday prayers|under international pressure|as the death toll rose to {count}
  |in war-torn {country}|before the general election|following weeks of unrest
Sports.who: the home team|the defending champions|the coach|the quarterback|the goalkeeper|the rookie pitcher|fans in {city}
  |the striker|the Olympic champion|the top seed|the world number {digit}|the referee|the {city} Hawks|the {city} Rovers
  |the {city} Bears|United|the relay team|the captain|midfielder {name}|the cycling federation|the league|the visiting side
  |the point guard|a substitute|the golfer|the driver on pole position|{country}'s batsmen|the {country} national team
  |the {city} Comets|the women's squad|the closer|the club's manager
Sports.did: beat|won|lost|scored in|qualified for|missed|clinched|dominated|drew|finished|hit a home run in|was dropped from
  |defended|trained for|led|overcame an injury in|celebrated|upset|swept|signed a contract before|was sent off in
Sports.what: the final|the semifinal|the championship|the playoff game|the opening match|a gold medal|the grand slam title
  |the World Cup qualifier|the second half|the pennant race|the relay|a hat-trick|the penalty shootout|the season opener
  |the fourth quarter|the first Test|the derby|a {score} victory|the {score} defeat|the transfer of {name}|the marathon
  |the doping hearing|a double overtime|the Grand Prix|the Ryder tournament|the batting record|the US Open draw
  |a career-high {count} points|the knockout stage|the locker room|the midfield battle|the trophy
Sports.where: in front of {count},000 fans|in extra time|at the stadium in {city}|on a wet pitch|in the ninth inning
  |with {digit} seconds left|after a {score} win|in straight sets|by {digit} strokes|for the third season in a row
  |in the last lap|at the Olympics|despite a knee injury|in group {letter}|with a {score} aggregate score
Business.who: the Federal Reserve|investors|the airline|the retailer|shareholders|crude oil futures|the central bank
  |the carmaker|Wall Street|the insurer|blue-chip shares|the chief executive|regulators|the drugmaker|the dollar
  |the steel group|consumer confidence|the mortgage lender|analysts at {surname} Brothers|the trade deficit|the energy company
  |{surname} Holdings|{surname} &amp; Co.|the brewer|hedge funds|factory orders|the pension fund|the auditors|creditors
  |the bankrupt carrier|the finance director|{country}'s exporters|the stock exchange in {city}|treasury bonds
Business.did: reported|raised|cut|acquired|posted|sold|beat forecasts for|warned of|restructured|bid for|settled|downgraded
  |expected|lowered|outsourced|agreed to buy|filed for|rallied on|fell on|invested in|paid {money} for|doubled
Business.what: quarterly profit|interest rates|a {money} takeover|its dividend|the merger|{count} jobs|earnings per share
  |a profit warning|the price of crude oil|its stake in {surname} Corp.|bankruptcy protection|retail sales|the bond market
  |a hostile bid|inflation data|its credit rating|a rise of {percent} percent|a loss of {money}|the initial public offering
  |the accounting scandal|a pay cut|fuel costs|the outlook for the fourth quarter|a share buyback|the trade surplus
  |the jobless claims|a tax break|the labour dispute|same-store sales|the record high of {money} a barrel
Business.where: in early trading|on the New York Stock Exchange|in the third quarter|a share|on higher revenue
  |amid weak demand|after the closing bell|by {percent} percent|to cut costs|for {money} in cash|on the commodities market
  |as oil passed {money}|in a regulatory filing|ahead of the earnings season|at an annual rate of {percent} percent
Sci/Tech.who: scientists|astronomers|the search engine|software makers|a computer worm|the space agency
  |researchers at {surname} Labs|the open-source community|biologists|the chip maker|hackers|the Mars rover|the browser
  |engineers|paleontologists|the space probe|a security flaw|climate researchers|mobile phone users|the game studio
  |physicists in {city}|the music download service|geneticists|the {surname} telescope|the operating system|spammers
  |a virus writer|the orbiting laboratory|wireless carriers|bloggers|the supercomputer|a stem cell team|web users
Sci/Tech.did: launched|discovered|released|patched|unveiled|developed|infected|upgraded|photographed|tested|decoded|downloaded
  |designed|cloned|detected|installed|beamed back|encrypted|observed|blocked|shipped|simulated
Sci/Tech.what: a new operating system|the security patch|a fossil|the orbit of Saturn|version {digit}.{digit} of its software
  |an e-mail virus|the genome|a {digit}-gigahertz processor|a distant galaxy|broadband access|the desktop search tool
  |a space shuttle|stem cells|a handheld game console|spam filters|the digital music player|a hydrogen fuel cell
  |the source code|a species of dinosaur|flat-panel displays|the melting ice sheet|a {count}-gigabyte hard drive
  |Internet telephony|file-sharing networks|a robot|the web browser|a phishing scam|carbon dioxide levels
  |the wireless standard|nanotubes|a comet|the encryption key
Sci/Tech.where: on the Internet|in low Earth orbit|according to a study in Nature|in the laboratory|for Windows users
  |over broadband|{count} million years ago|on the surface of Mars|in the next release|with {digit} gigabytes of memory
  |using infrared light|online|at the developer conference in {city}|on millions of computers|in deep space
any.who: officials|a spokesman|{name}|a report|the company|the group|the chairman|critics|experts|a court in {city}|{country}
  |the authorities|lawyers for {name}|the newspaper|leaders|a survey|the union|the committee|the minister|{surname}|Microsoft
  |Google|the European Union|thousands of people|its rivals
any.did: announced|delayed|opened|welcomed|faced|criticised|backed|suspended|discussed|won|lost|reached|challenged|dropped
  |prepared for|took over|defended|confirmed|questioned|returned to|promised
any.what: the plan|a deal|the decision|a new rule|the talks|the results|a lawsuit|the report|a ban|its future|the project
  |the agreement|a record|the offer|{name}|the investigation|an appeal|the challenge|a two-year contract|the campaign
  |the market|the security of the network|oil supplies|the title|the race|a rival|the game
any.where: on {day}|this week|last {day}|in {month}|after {count} years|in {city}|for the first time|this year|late {day}
  |in {country}|since {month}|despite criticism|without comment|before the weekend|as expected|in a surprise move
headline: {who} {did} {what}|{what}: {who} {did} {what}|{who} and {who} in {city}|{did} {what}, {who} says
  |{name}: {what} {where}|Update {digit}: {who} {did} {what}|{who} {where}
clause: {who} {did} {what} {where}|{who} {did} {what}, {who} said {when}|{who} {did} {what}
  |{who} {did} {what} and {did} {what}|{what} {where} could decide the future of {what}, according to {who}
  |{who}, who {did} {what} {where}, {did} {what}|according to {who}, {who} {did} {what}
  |it was the {ordinal} time that {who} {did} {what} {where}|{when} {who} {did} {what} {where}|{who} said it had {did} {what}
  |quot;We have seen {what}, quot; said {name}|{who} #39;s view of {what} {where} was not shared by {who}
city: London|Baghdad|New York|Paris|Tokyo|Moscow|Beijing|Jerusalem|Washington|Athens|Chicago|Boston|San Francisco|Sydney|Kabul
  |Cairo|Nairobi|São Paulo|Zürich|Bogotá|Düsseldorf|Seattle|Toronto|Mumbai|Madrid|Milan|Houston|Detroit|Seoul|Lagos
country: Iraq|France|Japan|Russia|China|Israel|Britain|Greece|Australia|Afghanistan|Egypt|Kenya|Brazil|Switzerland|Colombia
  |Germany|Canada|India|Spain|Italy|South Korea|Nigeria|Sudan|Iran|Turkey|Côte d'Ivoire|Pakistan|Ukraine|Chile|Haiti
forename: James|Maria|David|José|Anna|Michael|Li|Ahmed|Sarah|Robert|Elena|Kofi|Peter|Yuki|Carlos|François|Zoë|Ivan|Susan|Tom
  |Fatima|Björn|Rosa|Andre|Kate|Raj|Mike|Lena|Omar|Grace
surname: Smith|Garcia|Müller|Johnson|Chen|Okafor|Ivanov|Tanaka|Brown|Rossi|Singh|Novák|Kim|Miller|Dubois|Walker|Haddad|Olsen
  |Peña|Fischer|Cohen|Allen|Mbeki|Sato|Clark|Petrov|Lopez|Young|Larsson|Weber|Baker|Reyes|Hill|Nguyen|Scott|Adler
name: {forename} {surname}
day: Monday|Tuesday|Wednesday|Thursday|Friday|Saturday|Sunday
when: on {day}
month: January|February|March|April|May|June|July|August|September|October|November|December
agency: Reuters|AP|AFP|BBC|Bloomberg|USATODAY.com|Canadian Press|SiliconValley.com|Forbes.com|Xinhua
emoji: 📈|⚽|🚀|🗳️|😀|🏆
ordinal: first|second|third|fourth|last
letter: A|B|C|D|E|F|G|H
digit: {1-9}
count: {2-90}
percent: {0-19}.{1-9}
score: {1-6}-{0-5}
amount: million|billion
money: \\${1-95}.{0-9} {amount}
"""


def _parse(text: str) -> dict[str, tuple[str, ...]]:
    """Split the text into sections."""
    sections = (section.partition(": ") for section in text.strip().replace("\n  ", "").splitlines())
    return {key: tuple(phrases.split("|")) for key, _, phrases in sections}


PHRASES = _parse(_TEXT)
"""Phrases by section."""
